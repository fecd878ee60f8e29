"""Parsers against the standard library's own; whole files are in test_files.py."""

import csv
import io
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoforward.data.tables import NoColumn, csv_values, json_rows, json_values, lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


def blocks(whole: str, size: int) -> Iterator[str]:
    return (whole[start : start + size] for start in range(0, len(whole), size))


@given(st.lists(VALUES.filter(lambda value: not isinstance(value, list)), min_size=1), st.integers(1, 20))
def test_json_is_read_as_by_the_standard_library_whatever_the_blocks(values: list[object], size: int) -> None:
    one_a_line = "".join(json.dumps(value) + "\n" for value in values)
    assert [*json_rows(blocks(one_a_line, size))] == values
    for indent in (None, 1):
        assert [*json_rows(blocks(json.dumps(values, indent=indent), size))] == values


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1), st.sampled_from(",;\t|"), st.integers(1, 20))
def test_csv_is_read_as_it_was_written(rows: list[tuple[str, str]], separator: str, size: int) -> None:
    rows = [tuple(each.replace("\r", "") or "-" for each in row) for row in rows]  # type: ignore[misc]
    filled = io.StringIO(newline="")
    csv.writer(filled, delimiter=separator, lineterminator="\n").writerows([("id", "text"), *rows])
    assert [*csv_values(blocks(filled.getvalue(), size), "text")] == [text for _, text in rows]


@given(st.text(), st.integers(1, 9))
def test_lines_end_at_line_feeds_alone(whole: str, size: int) -> None:
    found = [*lines(blocks(whole, size))]
    assert "".join(found).removesuffix("\n") == whole.removesuffix("\n")
    assert all(line.count("\n") == 1 for line in found[:-1])


def test_a_table_without_the_column_says_which_it_has() -> None:
    for values in (json_values(iter(['{"a": 1}\n{"b": 2}']), "text"), csv_values(iter(["a,b\n1,2\n"]), "text")):
        with pytest.raises(NoColumn, match="a, b"):
            list(values)
