"""The files that a path, directory or glob means, and the documents in each: a text file is one, a row of a table is.

What was passed over is kept, to be told: nothing is left out without a word.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from isoforward.base.config import DataConfig
from isoforward.base.errors import BadInput
from isoforward.base.units import several
from isoforward.data import tables
from isoforward.data.columns import instead
from isoforward.data.text import NotText, Pieces, cleaned, decoded, pieces

TABLES = {
    "json": ".json .jsonl .ndjson",
    "csv": ".csv",
    "tsv": ".tsv .tab",
    "parquet": ".parquet .pq",
    "arrow": ".arrow .feather",
}
NOT_READ = {  # though text may be in there
    "packed": ".zip .tar .tgz .tbz .txz .7z .rar .lz4 .lzo .br .z .sz .warc .db .sqlite .sqlite3 .pdf .doc .docx .odt "
    ".rtf .xls .xlsx .ods .ppt .pptx .epub .mobi .djvu",
    "no text": ".png .jpg .jpeg .gif .bmp .tif .tiff .webp .ico .mp3 .wav .flac .ogg .m4a .mp4 .avi .mkv .mov .webm "
    ".npy .npz .pt .pth .ckpt .safetensors .gguf .pkl .pickle .bin .idx .h5 .hdf5 .onnx .so .dll .exe .o .a .pyc "
    ".class .jar .whl .ttf .otf .woff .woff2",
}
FORMATS = {suffix: format for format, suffixes in (TABLES | NOT_READ).items() for suffix in suffixes.split()}


def zstandard(path: Path, mode: str) -> BinaryIO:
    import pyarrow as pa

    stream: BinaryIO = pa.input_stream(str(path), compression="zstd")
    return stream


OPENERS: dict[str, Callable[..., object]] = {
    "": open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": zstandard,
    ".zstd": zstandard,
}
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError)  # of pyarrow, too


@dataclass(frozen=True, kw_only=True)
class TextFile:
    path: Path
    format: str  # of TABLES or NOT_READ, or text
    compression: str  # the suffix, or nothing
    suffix: str  # as it is told: .txt, .csv.gz

    @classmethod
    def named(cls, path: Path) -> TextFile:
        """By its suffixes, in any case. What is not known is text, and refused while it is read if it is none."""
        last, within = path.suffix.lower(), Path(path.stem).suffix.lower()
        compression = last if last in OPENERS else ""
        kind = within if compression else last
        format = FORMATS.get(kind, "text")
        if compression and format in ("parquet", "arrow"):  # which are read from several places at once
            format = "packed"
        suffix = f"{kind if kind in FORMATS or kind == '.txt' else ''}{compression}" if compression else last
        return cls(path=path, format=format, compression=compression, suffix=suffix)

    def documents(self, column: str) -> Pieces:
        """BadInput names the file, the row and the place; NoColumn where a table has no such column."""
        row = 1
        try:
            if self.format == "text":
                with self.opened() as stream:
                    yield from pieces(decoded(stream))
                return
            for value in self.values(column):
                text = cleaned(value)
                row += 1
                yield from pieces([text])
        except NotText as error:
            raise BadInput(f"{self.path}{'' if self.format == 'text' else f': row {row}'} {error}") from error
        except UNREADABLE as error:
            said = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadInput(f"{self.path} could not be read: {said}") from error

    def values(self, column: str) -> tables.Values:
        if self.format in ("parquet", "arrow"):
            read = tables.parquet_values if self.format == "parquet" else tables.arrow_values
            yield from read(self.path, column)
            return
        with self.opened() as stream:
            blocks = decoded(stream)
            if self.format == "json":
                yield from tables.json_values(blocks, column)
            else:
                separators = "\t" if self.format == "tsv" else tables.SEPARATORS
                yield from tables.csv_values(blocks, column, separators=separators)

    def opened(self) -> BinaryIO:
        return cast(BinaryIO, OPENERS[self.compression](self.path, "rb"))


@dataclass(kw_only=True)
class TextFiles:
    """All files of a corpus, in order. `read` and `passed_over` say what the last reading met."""

    files: list[TextFile]
    column: str
    hidden: int = 0
    read: Counter[str] = field(default_factory=Counter)  # files by suffix
    passed_over: list[str] = field(default_factory=list)

    def documents(self) -> Pieces:
        """A table without the column is passed over where another has it, or where it is one JSON object."""
        self.read.clear()
        lacking = list[tuple[Path, tables.NoColumn]]()
        tables_read = 0
        for file in self.files:
            if file.format == "no text":
                continue
            try:
                yield from file.documents(self.column)
            except tables.NoColumn as error:
                lacking.append((file.path, error))
            else:
                self.read[file.suffix] += 1
                tables_read += file.format in TABLES
        objects_beside_text = self.read and all(error.single for _, error in lacking)
        if lacking and not tables_read and not objects_beside_text:
            path, found = lacking[0]
            raise BadInput(f"{path} has no column {self.column}; {instead(found.columns, self.column)}")
        left_out = Counter(file.suffix for file in self.files if file.format == "no text")
        self.passed_over = [f"{count:,} {suffix}" for suffix, count in sorted(left_out.items())]
        if lacking:
            names = ", ".join(path.name for path, _ in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            self.passed_over.append(f"{len(lacking):,} without a column {self.column} ({names})")
        if self.hidden:
            self.passed_over.append(f"{self.hidden:,} hidden")

    def told(self) -> tuple[str, ...]:
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(self.read.items()))
        told = f"{several(self.read.total(), 'file')} read: {kinds}"
        return (told, *(f"passed over: {left}" for left in [", ".join(self.passed_over)] if left))


def found(path: str, column: str) -> TextFiles:
    """BadInput where there is no file, or one that may hold text in a form that is not read here."""
    named = Path(path).expanduser()
    hidden = 0
    if named.is_dir():
        below = list(beneath(named))
        paths = [one for one in below if not any(part.startswith(".") for part in one.relative_to(named).parts)]
        hidden = len(below) - len(paths)
    elif named.exists() and not named.is_file():
        raise BadInput(f"data.path={path} can be read but once, and is read several times: make it a file first")
    else:
        matches = glob.glob(str(named), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        paths = [named] if named.exists() else [one for match in matches if (one := Path(match)).is_file()]
    if not paths:
        but = f", only {hidden} hidden ones" if hidden else ""
        raise BadInput(f"data.path={path} is no file, and no directory or glob that holds any{but}")
    files = [TextFile.named(path) for path in sorted(paths, key=Path.as_posix)]
    readable = sum(file.format != "no text" for file in files)
    for file in files:
        if file.format == "packed" or not readable:
            raise BadInput(
                f"{file.path}: {file.suffix} is not read; unpack or convert it first, or leave it out "
                "(data.path='FOLDER/*.txt')"
            )
    if column != DataConfig.column and all(file.format not in TABLES for file in files):
        raise BadInput(f"data.column={column}: nothing in data.path={path} has columns; leave this key out")
    return TextFiles(files=files, column=column, hidden=hidden)


def beneath(directory: Path) -> Iterator[Path]:
    """All files below, through symbolic links too, but into no directory twice."""
    seen = set[str]()
    for root, directories, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        yield from (file for name in names if (file := Path(root, name)).is_file())
