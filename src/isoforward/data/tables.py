"""The rows of a file, one column of each: JSON, CSV, Parquet and Arrow, as they are, whatever the other columns hold.

Nothing is guessed: `null`, `NA` and `None` in a CSV file are text, and a number is refused rather than spelt out. That
is why CSV and JSON are read by the standard library, where pyarrow and pandas infer types of all columns.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from isoforward.data.columns import TEXT, Held, held_in, instead, joined, kind, path_in, row_of, value_at
from isoforward.data.text import NotText

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256  # of a Parquet file in memory at once
WIDEST = 2**31 - 1  # characters of a CSV field
SEPARATORS = ",;\t|"

Values = Iterator[object]  # of the wanted column, None where a row lacks it


class NoColumn(Exception):
    """A table without the wanted column; `columns` are those it has."""

    def __init__(self, columns: Held, *, single: bool = False) -> None:
        self.columns = columns
        self.single = single  # one JSON object, which is rather a configuration than a table
        super().__init__(", ".join(columns))


def json_values(blocks: Iterator[str], column: str) -> Values:
    """Of JSON objects one after another (JSON lines, ndjson, pretty-printed too), or of one array of them."""
    columns = Held()
    lacking, found = 0, False  # rows before the first that has the column
    rows, end = json_rows(blocks), object()
    while True:
        try:
            row = next(rows, end)
            if row is end:
                break
            if not isinstance(row, dict):
                raise NotText(f"is {kind(row)}, not an object with a field {column}")
            path = path_in(row, column)
            value = value_at(row, path) if path else None
            refuse_other_than_text(value, row, column)
        except NotText:
            yield from [None] * lacking  # so that the row is counted right
            raise
        if not found and not path:
            lacking += 1
            columns = joined(columns, held_in(row)) if lacking <= ROWS else columns
            continue
        yield from [None] * lacking
        lacking, found = 0, True
        yield value
    if lacking:
        raise NoColumn(columns, single=lacking == 1)


def refuse_other_than_text(value: object, row: dict[str, object], column: str) -> None:
    """By the row, which has what else could be taken. Bytes may be text, which is seen when they are read."""
    if not isinstance(value, str | bytes | None):
        raise NotText(f"holds {kind(value)}, not text; {instead(held_in(row), column)}")


SPACE = re.compile(r"[ \t\n\r]*")


def json_rows(blocks: Iterator[str]) -> Iterator[object]:
    """In memory are a block and the row under way. Numbers, which are no text, are not looked at."""
    decoder = json.JSONDecoder(parse_int=lambda _: 0, parse_float=lambda _: 0.0)
    text, at, lines_before = "", 0, 0
    fault: NotText | None = None  # met while reading ahead: raised once the rows before it are through

    def more() -> bool:
        """Reads on, at least as much again as there is, so that a long row is looked at few times."""
        nonlocal text, at, lines_before, fault
        if fault is not None:
            raise fault
        kept, size, read = [text[at:]], len(text) - at, 0
        lines_before += text.count("\n", 0, at)
        try:
            while read <= size and (block := next(blocks, None)) is not None:
                kept.append(block)
                read += len(block)
        except NotText as error:
            if not read:
                raise
            fault = error
        text, at = "".join(kept), 0
        return read > 0

    def line(place: int) -> int:
        return lines_before + text.count("\n", 0, place) + 1

    def character() -> str:
        """The next that is no space; none at the end."""
        nonlocal at
        while (at := SPACE.match(text, at).end()) == len(text):  # type: ignore[union-attr]
            if not more():
                return ""
        return text[at]

    def value() -> object:
        nonlocal at
        while True:
            try:
                row, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                place = line(error.pos)
                cut_off = error.pos >= len(text) - 10 or error.msg.startswith("Unterminated string")
                if not (cut_off and more()):
                    raise NotText(f"(line {place}) is no JSON: {error.msg}") from error
            except RecursionError as error:
                raise NotText("nests too deeply") from error
            else:
                return row

    if character() != "[":
        while following := character():
            if following == ",":
                raise NotText(
                    f"follows a comma at the end of line {line(at)}; JSON lines have none there: take them out"
                )
            yield value()
        return
    at += 1
    if character() != "]":
        yield value()
        while (following := character()) == ",":
            at += 1
            if character() == "]":
                raise NotText(f"(line {line(at)}) is missing after the last comma; take the comma out")
            yield value()
        if following != "]":
            raise NotText("does not follow a comma" if following else "is missing: the array does not end")
    at += 1
    if character():
        raise NotText("follows the end of the array")


def csv_values(blocks: Iterator[str], column: str, *, separators: str = SEPARATORS) -> Values:
    """The separator is the one under which the first line names `column`, or the most common there."""
    csv.field_size_limit(WIDEST)
    given = lines(blocks)
    first = next(given, None)
    if first is None:
        return
    headers = {separator: next(csv.reader([first], delimiter=separator)) for separator in separators}
    separator, header = max(headers.items(), key=lambda pair: (column in pair[1], len(pair[1])))
    if column not in header:
        raise NoColumn(dict.fromkeys(header, TEXT))
    place = header.index(column)
    reader = csv.reader(given, delimiter=separator, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise NotText(f"(line {reader.line_num + 1}) is no CSV: {error}") from error
        if row is None:
            return
        if len(row) > len(header):
            raise NotText(
                f"(line {reader.line_num + 1}) has {len(row)} fields, and the first line names {len(header)}: "
                "a field that holds the separator is written in quotes"
            )
        if row:
            yield row[place] if place < len(row) else None


def lines(blocks: Iterable[str]) -> Iterator[str]:
    """Ended by a line feed and nothing else, which a text may hold."""
    begun = list[str]()
    for block in blocks:
        first, *whole = block.split("\n")
        begun.append(first)
        if whole:
            yield "".join(begun) + "\n"
            yield from (f"{line}\n" for line in whole[:-1])
            begun = [whole[-1]]
    if last := "".join(begun):
        yield last


def parquet_values(file: Path, column: str) -> Values:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        path = path_to(table.schema_arrow, column)
        for batch in table.iter_batches(batch_size=ROWS, columns=[column]):
            yield from scalars(below(batch.column(batch.schema.names.index(path[0])), path))


def arrow_values(file: Path, column: str) -> Values:
    """Of an IPC file (Feather), or of a stream, which is how `datasets` keeps its own."""
    import pyarrow as pa

    with file.open("rb") as opened:
        open_reader = pa.ipc.open_file if opened.read(6) == b"ARROW1" else pa.ipc.open_stream
    with pa.memory_map(str(file)) as mapped:
        schema = open_reader(mapped).schema
        path = path_to(schema, column)
        mapped.seek(0)
        table = open_reader(mapped, options=pa.ipc.IpcReadOptions(included_fields=[schema.names.index(path[0])]))
        if open_reader is pa.ipc.open_file:
            batches = (table.get_batch(n) for n in range(table.num_record_batches))
        else:
            batches = iter(table)
        for batch in batches:
            yield from scalars(below(batch.column(0), path))


def path_to(schema: pa.Schema, column: str) -> list[str]:
    """The names that lead to the column of an Arrow schema."""
    row = row_of(schema)
    if not (path := path_in(row, column)):
        raise NoColumn(held_in(row))
    refuse_other_than_text(value_at(row, path), row, column)
    return path


def below(values: pa.Array, path: list[str]) -> pa.Array:
    """What the structs of a column of Arrow hold at the end of the path that begins with it; null where one is null."""
    from pyarrow import compute

    return compute.struct_field(values, path[1:]) if path[1:] else values


class Scalar(Protocol):
    """Of Arrow."""

    def as_py(self) -> object: ...


def scalars(values: Iterable[Scalar]) -> Values:
    for value in values:
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            raise NotText(f"is not UTF-8 at byte {error.start} of its text") from error
