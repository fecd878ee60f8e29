"""What a file is that should be text and is not, and the way out."""

from __future__ import annotations

import re

FIRST_BYTES = {  # of formats, and how a name ends that is read as one
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\0": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".zst"),
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("Arrow", ".arrow"),
    b"PK\3\4": ("a ZIP archive (as .docx, .xlsx and .epub are)", None),
    b"7z\xbc\xaf": ("a 7z archive", None),
    b"Rar!": ("a RAR archive", None),
    b"%PDF": ("PDF", None),
    b"\xd0\xcf\x11\xe0": ("an old document of Microsoft Office", None),
    b"SQLite format 3": ("an SQLite database", None),
    b"\x80\2": ("a pickle", None),
    b"\x93NUMPY": ("an array of NumPy", None),
    b"GGUF": ("GGUF", None),
    b"\x89PNG": ("a picture", None),
    b"\xff\xd8\xff": ("a picture", None),
    b"\x7fELF": ("a program", None),
}
NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # no encoding of text but UTF-16 and UTF-32 has these
BETWEEN = re.compile(rb"[\x80-\x9f]")  # quotes and dashes in Windows' encoding, control characters in Latin-1


def otherwise(first: bytes) -> str | None:
    """What a file that begins so is by its first bytes, to be read after its name."""
    for begins, (what, suffix) in FIRST_BYTES.items():
        if first.startswith(begins):
            way_out = f"let its name end in {suffix}" if suffix else "take the text out of it, or leave the file out"
            return f"is {what} by its first bytes, and no text as it is; {way_out}"
    for encoding, zeros in (("utf-16le", first[1:400:2]), ("utf-16be", first[0:400:2])):
        if zeros.count(0) > len(zeros) / 2:
            return f"is {encoding.upper()} without a mark that says so; convert it first (iconv -f {encoding} -t utf-8)"
    return None


def not_utf8(block: bytes, place: int, *, met_others: bool) -> str:
    """Of text whose `block` ends to be UTF-8 at byte `place` of it; `met_others`: beyond ASCII, it was UTF-8 before."""
    if found := NO_TEXT.search(block):
        return f"is not UTF-8 at byte {place} and holds the byte {found[0][0]}, so it is no text; leave the file out"
    if met_others:
        return f"is not UTF-8 at byte {place}, though it is before; leave such bytes out (iconv -c -f utf-8 -t utf-8)"
    likely = "cp1252" if BETWEEN.search(block) else "latin1"
    return f"is not UTF-8 at byte {place}; convert it first (iconv -f {likely} -t utf-8, if that is what it is)"
