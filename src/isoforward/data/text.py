"""What counts as text: UTF-8, no byte-order mark, line breaks LF, whatever the locale and however it is stored.

What is not UTF-8, and NUL, is refused with its place.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from isoforward.data.columns import kind
from isoforward.data.foreign import not_utf8, otherwise

BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 16  # characters encoded at once by one core
OTHER_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Pieces = Iterator[str | None]  # a document's text in pieces, then None


class NotText(ValueError):
    """What is wrong, to be read after the name of the file and the row."""


def decoded(stream: BinaryIO) -> Iterator[str]:
    """The text of `stream` block by block. NotText says at which byte it ends to be text."""
    decoder, breaks = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, translate=True)
    block = stream.read(BLOCK)
    for mark, encoding in OTHER_MARKS.items():
        if block.startswith(mark):
            raise NotText(f"is {encoding.upper()}; convert it first (iconv -f {encoding} -t utf-8)")
    first, met_others = block, False  # others than ASCII's characters
    offset = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
    block = block[offset:]
    while True:
        pending = len(decoder.getstate()[0])  # bytes of a character that the block before broke off
        fault = None
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode()
            fault = not_utf8(block, offset - pending + error.start, met_others=met_others or not text.isascii())
        met_others = met_others or not text.isascii()
        if (nul := text.find("\0")) >= 0:
            text, place = text[:nul], offset - pending + len(text[:nul].encode())
            fault = f"holds a NUL at byte {place}, so it is no text; take it out or leave the file out"
        if fault is not None and (said := otherwise(first)):
            raise NotText(said)  # what came before was no text, either
        yield breaks.decode(text, final=not block)
        if fault is not None:
            raise NotText(fault)
        if not block:
            return
        offset += len(block)
        block = stream.read(BLOCK)


def cleaned(value: object) -> str:
    """The text of a row; none where the row has none. NotText where it holds something else."""
    if value is None:
        return ""
    if isinstance(value, bytes):  # a Parquet file whose writer did not say that they are text
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise NotText(f"is not UTF-8 at byte {error.start} of its text") from error
    if not isinstance(value, str):
        raise NotText(f"holds {kind(value)}, not text")
    if "\0" in value:
        raise NotText(f"holds a NUL at character {value.index(chr(0))}, so it is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NotText(f"holds half of a surrogate pair at character {error.start}, which no UTF-8 can") from error
    return value.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def pieces(blocks: Iterable[str]) -> Pieces:
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
