"""Dotted names; whole files with nested columns are in test_files.py."""

from hypothesis import given
from hypothesis import strategies as st

from isoforward.data.columns import held_in, kind, path_in, value_at

NAMES = st.text("ab", min_size=1, max_size=2)  # without a dot, which can make two columns one name


@given(
    st.dictionaries(NAMES, st.recursive(st.text() | st.lists(st.text()), lambda inner: st.dictionaries(NAMES, inner)))
)
def test_every_column_that_is_offered_can_be_asked_for(row: dict[str, object]) -> None:
    for name, held in held_in(row).items():
        assert kind(value_at(row, path_in(row, name))) == held
    assert path_in(row, "c") == path_in(row, "a.c.b") == []


def test_a_name_may_hold_a_dot() -> None:
    row = {"a.b": {"c.d": "deep"}, "a": {"b": "nested", "b.c": {}}, "a.b.c": "whole"}
    for name, held in {"a.b.c.d": "deep", "a.b.c": "whole"}.items():
        assert value_at(row, path_in(row, name)) == held
