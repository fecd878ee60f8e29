"""What is no UTF-8 text, and that the way out that is named leads there. Places in files are in test_files.py."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from isoforward.base.errors import BadInput

from .test_files import TEXTS, documents, json_lines, prepared, written, zstd

GERMAN = "Der Rhein fließt schön – „so“ heißt es. " * 30


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GERMAN.replace("–", "-").replace("„", '"').replace("“", '"').encode("latin1"), "latin1"),
        (GERMAN.encode("cp1252"), "cp1252"),
        (GERMAN.encode("utf-16"), "utf-16"),
        (GERMAN.encode("utf-16le"), "utf-16le"),
        (GERMAN.encode("utf-16be"), "utf-16be"),
    ],
)
def test_the_iconv_that_is_named_makes_it_the_text_it_was(content: bytes, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", content)
    with pytest.raises(BadInput, match=rf"iconv -f {said} -t utf-8[,)]") as refused:
        prepared(tmp_path, path)
    command = re.search(r"iconv [-\w ]+", str(refused.value))
    assert command
    done = subprocess.run([*command[0].split(), str(path)], capture_output=True, check=True)
    path.write_bytes(done.stdout)
    kept = GERMAN if said != "latin1" else GERMAN.replace("–", "-").replace("„", '"').replace("“", '"')
    assert "".join(documents(prepared(tmp_path, path))) == kept


def test_text_that_is_damaged_keeps_its_encoding(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", GERMAN.encode() + b"\xc3")
    with pytest.raises(BadInput, match=r"though it is before; leave such bytes out \(iconv -c -f utf-8 -t utf-8\)"):
        prepared(tmp_path, path)
    path.write_bytes(subprocess.run(["iconv", "-cf", "utf-8", "-t", "utf-8", path], capture_output=True).stdout)
    assert "".join(documents(prepared(tmp_path, path))) == GERMAN


@pytest.mark.parametrize(
    ("what", "suffix", "pack"),
    [
        ("gzip", ".gz", gzip.compress),
        ("bzip2", ".bz2", bz2.compress),
        ("xz", ".xz", lzma.compress),
        ("Zstandard", ".zst", zstd),
    ],
)
def test_what_is_packed_under_another_name_is_read_under_its_own(
    what: str, suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = written(tmp_path, "a.jsonl", pack(json_lines().encode()))
    with pytest.raises(BadInput, match=rf"is {what} by its first bytes.*let its name end in \{suffix}$"):
        prepared(tmp_path, path)
    assert documents(prepared(tmp_path, path.rename(tmp_path / f"a.jsonl{suffix}"))) == sorted(TEXTS)
