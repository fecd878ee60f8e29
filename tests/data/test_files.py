"""Text as the world stores it: the same text is the same corpus, and what is none is refused by file, row and place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from isoforward.base.config import DataConfig
from isoforward.base.errors import BadInput
from isoforward.data import text
from isoforward.data.corpus import Corpus, prepare

LIST = pa.list_(pa.string())
TEXTS = [
    *(f'row {n}: naïve "quotes", commas; tabs\tand | bars\nsecond\u2028line {n}' for n in range(60)),
    *("null", "NA", "None", "nan", "-", "1", "true"),
]


def prepared(where: Path, path: object, **keys: Any) -> Corpus:
    config = {"source": "text", "tokenizer": "char", "length": 8, "cache_dir": str(where / "cache")}
    return prepare(DataConfig(path=str(path), **{**config, **keys}))


def documents(corpus: Corpus) -> list[str]:
    parts = (corpus.tokenizer.decode(part.tolist(), special=True) for part in (corpus.train, corpus.validation))
    return sorted(one for part in parts for one in part.split("<|endoftext|>") if one)


def written(where: Path, name: str, content: bytes | str) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    path = where / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(**more: object) -> list[dict[str, object]]:
    return [{"url": f"https://example.org/{n}", "text": one, **more} for n, one in enumerate(TEXTS)]


def json_lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in rows())


def table(delimiter: str, breaks: str = "\n") -> str:
    filled = io.StringIO(newline="")
    writer = csv.DictWriter(filled, ["url", "text"], delimiter=delimiter, lineterminator=breaks)
    writer.writeheader()
    writer.writerows(rows())
    return filled.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(kind: Any = pa.string()) -> pa.Table:  # noqa: B008 (made once, and never changed)
    kinds: dict[Any, list[Any]] = {pa.binary(): [one.encode() for one in TEXTS], LIST: [[one] for one in TEXTS]}
    texts = pa.array(kinds.get(kind, TEXTS), kind)
    return pa.table({"number": list(range(len(TEXTS))), "text": texts, "nested": [{"a": [1, 2]}] * len(TEXTS)})


def parquet_of(kind: Any = pa.string()) -> bytes:  # noqa: B008
    sink = io.BytesIO()
    parquet.write_table(arrow(kind), sink, row_group_size=7)
    return sink.getvalue()


def ipc(new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with new(sink, arrow().schema) as writer:
        writer.write_table(arrow(), max_chunksize=9)
    return sink.getvalue()


STORED: dict[str, Callable[[], bytes | str]] = {
    "rows.jsonl": json_lines,
    "rows.ndjson": json_lines,
    "lines.json": json_lines,
    "rows.json.gz": lambda: gzip.compress(json_lines().encode(), mtime=0),
    "rows.jsonl.zst": lambda: zstd(json_lines().encode()[:999]) + zstd(json_lines().encode()[999:]),
    "rows.jsonl.zstd": lambda: zstd(json_lines().encode()),
    "rows.jsonl.xz": lambda: lzma.compress(json_lines().encode()),
    "rows.JSONL.BZ2": lambda: bz2.compress(json_lines().encode()),
    "array.json": lambda: json.dumps(rows()),
    "pretty.json": lambda: json.dumps(rows(), indent=2, ensure_ascii=False),
    "objects.json": lambda: "\n".join(json.dumps(row, indent=2) for row in rows()),
    "windows.jsonl": lambda: b"\xef\xbb\xbf" + json_lines().replace("\n", "\r\n").encode(),
    "changing.jsonl": lambda: "".join(
        json.dumps({**row, "url": [1, "one", {"a": 1}, None, 1e400, 2**80][n % 6]}) + "\n"
        for n, row in enumerate(rows())
    ),
    "rows.csv": lambda: table(","),
    "rows.csv.gz": lambda: gzip.compress(table(",").encode()),
    "semicolons.csv": lambda: table(";"),
    "bars.csv": lambda: table("|"),
    "rows.tsv": lambda: table("\t"),
    "excel.csv": lambda: b"\xef\xbb\xbf" + table(",", "\r\n").encode(),
    "rows.parquet": parquet_of,
    "large.parquet": lambda: parquet_of(pa.large_string()),
    "bytes.parquet": lambda: parquet_of(pa.binary()),
    "words.parquet": lambda: parquet_of(pa.dictionary(pa.int32(), pa.string())),
    "stream.arrow": lambda: ipc(pa.ipc.new_stream),
    "file.feather": lambda: ipc(pa.ipc.new_file),
}


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    where = tmp_path_factory.mktemp("plainly")
    return prepared(where, written(where, "rows.jsonl", json_lines()))


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("block", [1 << 20, 97], ids=["whole", "in blocks"])
def test_the_same_rows_are_the_same_corpus_however_they_are_stored(
    plainly: Corpus, name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK", block)
    stored = prepared(tmp_path, written(tmp_path, name, STORED[name]()))
    assert documents(stored) == sorted(TEXTS)
    assert stored.hash == plainly.hash


@pytest.mark.parametrize("name", ["book.txt", "book.md", "BOOK", "book.txt.gz", "book.xz", "book.zst", "book.rst"])
def test_a_text_file_is_one_document_whatever_it_is_called_and_packed_in(name: str, tmp_path: Path) -> None:
    whole = "# Title\n\nnull, [NA] and \u2028 are text\n" * 50
    packers: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd}
    content = packers.get(name.rpartition(".")[2], bytes)(whole.encode())
    beside = written(tmp_path / "a", "row.json", json.dumps([{"text": whole}]))
    assert prepared(tmp_path, written(tmp_path / "b", name, content)).hash == prepared(tmp_path, beside).hash


def test_text_that_spells_nothing_is_text(tmp_path: Path) -> None:
    """Case 6: 200 times these four rows are 21 characters each time, and no token ends a row of characters."""
    stored = prepared(tmp_path, written(tmp_path, "rows.csv", "text\n" + "word001\nnull\nNone\nNA\n" * 200))
    ends = 800
    assert len(stored.train) + len(stored.validation) == 200 * len("word001nullNoneNA") + ends == 4200


def test_a_folder_is_read_whole_and_says_what_it_left_out(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    written(folder, "a.jsonl", '{"text": "one"}\n\n{"text": ""}\n{"other": 1}\n{"text": null}\n' * 9)
    written(folder / "deep" / "er", "b.csv.gz", gzip.compress(b"id,text\n1,two\n" * 1 + b"2,two\n" * 8))
    written(folder, "lacks.csv", "id,body\n1,three\n")
    written(folder, "dataset_info.json", '{"features": {"text": "string"}}')
    written(folder, "cover.png", b"\x89PNG\0\xff")
    written(folder, ".hidden.txt", "no")
    written(folder / ".git", "config", "no")
    written(elsewhere, "c.parquet", parquet_of())
    (folder / "link").symlink_to(elsewhere, target_is_directory=True)
    (folder / "link.txt").symlink_to(written(tmp_path, "linked.text", "a linked file " * 9))
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    for _ in range(2):  # the second time from the cache
        read = prepared(tmp_path, folder)
        assert documents(read) == sorted(["one"] * 9 + ["two"] * 9 + TEXTS + ["a linked file " * 9])
        characters = sum(map(len, documents(read)))
        size = sum(len(one.encode()) for one in documents(read))
        assert read.description[1:4] == (
            f"86 documents, 27 without text passed over, {characters:,} characters, {size:,} bytes",
            "4 files read: 1 .csv.gz, 1 .jsonl, 1 .parquet, 1 .txt",
            "passed over: 1 .png, 2 without a column text (dataset_info.json, lacks.csv), 2 hidden",
        )


def test_only_the_wanted_column_is_looked_at(tmp_path: Path) -> None:
    broken = pa.table({"text": TEXTS, "other": pa.array([b"\xff"] * len(TEXTS), pa.binary()).view(pa.string())})
    parquet.write_table(broken, tmp_path / "a.parquet")
    assert documents(prepared(tmp_path, tmp_path / "a.parquet")) == sorted(TEXTS)
    with pytest.raises(BadInput, match=r"a\.parquet: row 1 is not UTF-8 at byte 0 of its text"):
        prepared(tmp_path, tmp_path / "a.parquet", column="other")


NESTED = [{"meta": {"about": {"text": one}, "n": n}} for n, one in enumerate(TEXTS)] + [{"meta": None}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.feather"])
def test_a_column_within_others_has_a_dotted_name(plainly: Corpus, name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, "".join(json.dumps(row) + "\n" for row in NESTED))
    if name == "a.json":
        path.write_text(json.dumps(NESTED))
    elif name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist(NESTED), path)
    elif not name.endswith("jsonl"):
        new = pa.ipc.new_stream if name == "a.arrow" else pa.ipc.new_file
        with new(path, (nested := pa.Table.from_pylist(NESTED)).schema) as writer:
            writer.write_table(nested)
    assert prepared(tmp_path, path, column="meta.about.text").hash == plainly.hash
    with pytest.raises(BadInput, match=r"has no column text; write data\.column=meta\.about\.text$"):
        prepared(tmp_path, path)
    with pytest.raises(BadInput, match=r"row 1 holds an object, not text; write data\.column=meta\.about\.text$"):
        prepared(tmp_path, path, column="meta.about")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", parquet_of(), r"a\.txt is Parquet by its first bytes, .* let its name end in \.parquet$"),
        (
            "a.txt",
            b"PK\3\4\x14\0\6",
            r"a\.txt is a ZIP archive \(as \.docx, \.xlsx and \.epub are\) by its first bytes",
        ),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", r"is PDF by its first bytes, .*; take the text out of it, or leave"),
        (
            "a.txt",
            b"Kb\xa9?\xb5\xfd\2\x91",
            r"is not UTF-8 at byte 2 and holds the byte 2, so it is no text; leave the",
        ),
        ("a.txt", b"ab\0cd" * 9, r"holds a NUL at byte 2, so it is no text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "t\xff"}\n', r"row 2 is not UTF-8 at byte 27; convert it"),
        ("a.json", b'[{"text": "one"}, {"text": "t\xff"}]', r"row 2 is not UTF-8 at byte 29;"),
        ("a.csv", b"id,text\n1,one\n2,t\xff\n", r"row 2 is not UTF-8 at byte 17;"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "t\xff"}', mtime=0), r"row 1 is not UTF-8 at byte 11;"),
        ("a.jsonl", '{"text": "one"}\n{"text": "t"\n{"text": "three"}\n', r"row 2 \(line 3\) is no JSON"),
        ("a.jsonl", '{"text": "one"},\n{"text": "two"}\n', r"row 2 follows a comma at the end of line 1; JSON lines"),
        ("a.jsonl", '{"text": "a"}\n\n{"text":\n"b"},', r"row 3 follows a comma at the end of line 4;"),
        ("a.json", '[{"text": "a"},\n{"text": "b"},\n]', r"row 3 \(line 3\) is missing after the last comma; take"),
        ("a.jsonl", '{"text": "one"}\n{"text": "t\nwo"}\n', r"row 2 \(line 2\) is no JSON: Invalid control character"),
        ("a.jsonl", '{"text": "one"}\n{"text": "t', r"row 2 \(line 2\) is no JSON: Unterminated string"),
        ("a.json", '[{"text": "one"}, {"text": "two"}', r"row 3 is missing: the array does not end"),
        ("a.json", '[{"text": "one"} {"text": "two"}]', r"row 2 does not follow a comma"),
        ("a.json", '["one", "two"]', r"row 1 is text, not an object with a field text"),
        ("a.jsonl", '{"id": 1}\nnull\n{"text": "b"}', r"row 2 is null, not an object with a field text"),
        ("a.jsonl", '{"text": "\\u0000"}', r"row 1 holds a NUL at character 0"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b\\ud800"}', r"row 2 holds half of a surrogate pair at character 1"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": ["b"]}',
            r"row 2 holds a list of texts, not text; no other column of text is there; give each row one$",
        ),
        (
            "a.jsonl",
            '{"text": ["b"], "n": 1, "t": "c"}',
            r"row 1 holds a list of texts, not text; write data\.column=t$",
        ),
        ("a.jsonl", '{"meta": {"text": "a"}, "n": 1}', r"a\.jsonl has no column text; write data\.column=meta\.text$"),
        ("a.jsonl", '{"a": "", "b": {"c": ""}}', r"has no column text; write data\.column=, one of a, b\.c$"),
        (
            "a.json",
            '{"data": [{"text": "a"}]}',
            r"no column text; no column of text is there \(data is a list of objects\); give each row one$",
        ),
        ("a.parquet", parquet_of(LIST), r"row 1 holds a list of texts, not text; no other column of text"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"row 1 nests too deeply"),
        ("a.csv", "text\nHello, world\n", r"row 1 \(line 2\) has 2 fields, and the first line names 1"),
        ("a.csv", 'id,text\n1,one\n2,"two\n', r"row 2 \(line 3\) is no CSV: unexpected end of data"),
        ("a.csv", "id;body\n1;one\n", r"a\.csv has no column text; write data\.column=, one of id, body"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet could not be read: "),
        ("a.arrow", b"nothing of the kind", r"a\.arrow could not be read: "),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 999, mtime=0)[:-9],
            r"a\.txt\.gz could not be read: Compressed file ended",
        ),
        ("a.txt.zst", zstd(b"text" * 999)[:-9], r"a\.txt\.zst could not be read: Truncated"),
        ("a.jsonl.xz", b"no xz", r"a\.jsonl\.xz could not be read: "),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is UTF-16; convert it first \(iconv -f utf-16"),
        ("a.zip", b"PK", r"a\.zip: \.zip is not read; unpack or convert it first"),
        ("a.parquet.gz", b"", r"\.parquet\.gz is not read; unpack"),
        ("a.tar.gz", b"", r"\.tar\.gz is not read; unpack"),
        ("a.jsonl.lz4", b"", r"\.lz4 is not read; unpack"),
        ("a.png", b"", r"\.png is not read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_file_row_and_place(
    name: str, content: bytes | str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        prepared(tmp_path, written(tmp_path, name, content))
    assert name in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_a_column_of_files_that_have_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("To be, or not to be.\n" * 99)
    with pytest.raises(BadInput, match=r"data\.column=body: nothing in data\.path=.* has columns; leave this key out"):
        prepared(tmp_path, tmp_path / "a.txt", column="body")
    (tmp_path / "b.csv").write_text("id;body\n" + "1;That is the question.\n" * 99)
    prepared(tmp_path, tmp_path / "[ab].*", column="body")


def test_what_can_be_read_but_once_says_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="can be read but once"):
        prepared(tmp_path, tmp_path / "pipe")


SHORT = "a short row beside it"


@pytest.mark.parametrize("name", ["row.jsonl", "row.json", "row.csv", "row.parquet"])
def test_a_row_of_many_megabytes_is_a_row(name: str, tmp_path: Path) -> None:
    row = "0123456789" * 310_000 + "\n"
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"text": [row, SHORT]}), tmp_path / name)
    elif name.endswith("csv"):
        written(tmp_path, name, f'text,id\n"{row}",1\n{SHORT},2\n')
    elif name.endswith("jsonl"):
        written(tmp_path, name, "".join(json.dumps({"text": one}) + "\n" for one in (row, SHORT)))
    else:
        written(tmp_path, name, json.dumps([{"text": one} for one in (row, SHORT)]))
    assert documents(prepared(tmp_path, tmp_path / name, validation=0.5)) == [row, SHORT]
