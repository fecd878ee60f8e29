"""What the columns of a table hold, and those within others by a dotted name: `meta.text` is the text in `meta`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

TEXT = "text"
NAMED = 20  # columns in a message
DEEPEST = 5  # names of a dotted one that is offered

Held = dict[str, str]  # what a column holds, in words, by its dotted name


def path_in(row: object, column: str) -> list[str]:
    """The names that lead to `column`, outermost first; none where nothing is called that. A name may hold a dot."""
    if not isinstance(row, dict):
        return []
    if column in row:
        return [column]
    within = ((name, path_in(row[name], column[len(name) + 1 :])) for name in row if column.startswith(f"{name}."))
    return next(([name, *rest] for name, rest in within if rest), [])


def value_at(row: object, path: Iterable[str]) -> object:
    return reduce(getitem, path, row)  # type: ignore[arg-type]  # getitem is typed for sequences alone


def held_in(row: Mapping[str, object], before: str = "") -> Held:
    """Of what is null nothing is known."""
    found = Held()
    for name, value in row.items():
        if isinstance(value, dict) and value and before.count(".") + 1 < DEEPEST:
            found |= held_in(value, f"{before}{name}.")
        elif value is not None:
            found[before + name] = kind(value)
    return found


def joined(one: Held, other: Held) -> Held:
    """Of two rows."""
    both = dict(one)
    for name, held in other.items():
        kinds = one.get(name, held).split(" or ")
        both[name] = " or ".join(kinds if held in kinds else [*kinds, held])
    return both


def kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case str():
            return TEXT
        case bytes():
            return "bytes"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case dict():
            return "an object"
        case list():
            kinds = {kind(item) for item in value[:NAMED]}
            return {TEXT: "a list of texts", "an object": "a list of objects"}.get("".join(kinds), "a list")
    return str(value)  # a type of Arrow that is none of these


def row_of(fields: Iterable[pa.Field]) -> dict[str, object]:
    """Such as a table of this schema has."""
    return {field.name: example(field.type) for field in fields}


def example(of: pa.DataType) -> object:
    """A value such as a column of an Arrow type holds."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_struct(of):
        return row_of(of)
    if types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of):
        return [example(of.value_type)]
    if types.is_dictionary(of):
        return example(of.value_type)
    if isinstance(of, pa.BaseExtensionType):
        return example(of.storage_type)
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return ""
    if types.is_binary(of) or types.is_large_binary(of) or types.is_binary_view(of):
        return b""
    if types.is_integer(of) or types.is_floating(of) or types.is_decimal(of):
        return 0
    return None if types.is_null(of) else types.is_boolean(of) or of


def instead(columns: Held, column: str) -> str:
    """The way out where `column` is not there or holds no text."""
    others = [name for name, held in columns.items() if held == TEXT and name != column]
    if others:
        of_several = ", one of " if len(others) > 1 else ""
        return f"write data.column={of_several}{listed(others)}"
    known = listed([f"{name} is {held}" for name, held in columns.items() if held != TEXT and name != column])
    return f"no {'other ' * (column in columns)}column of text is there{known and f' ({known})'}; give each row one"


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
