"""Files of strangers, damaged in every way that hypothesis finds: read, or refused by a declared error.

While one is read, memory and processor time are bounded, and an audit hook watches that nothing is unpickled, started,
connected to, or written outside the test's own directory. The full run is `ISOFORWARD_FUZZ=100000 pytest -m slow
tests/test_fuzz.py`; by default each kind of file is tried a few dozen times.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isoforward.base import results
from isoforward.base.dependent_keys import flat
from isoforward.base.errors import Refusal
from isoforward.base.results import Environment, Record, Row, Verdict
from isoforward.base.statistics import judge
from isoforward.base.storage import sha256_of
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats import checkpoint_file, export, loading
from isoforward.model.gpt import GPT
from isoforward.serve import inference
from isoforward.train import stopping
from tests import planted
from tests.conftest import tiny
from tests.formats.test_checkpoint_file import sealed
from tests.formats.test_gguf_format import gguf_file

MEMORY = 2 * 2**30  # bytes beyond what the tests hold
PROCESSOR_S = 20.0
FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
)
ODD = [
    *(b"0", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"true", b"9" * 30, b'"\\ud800"', b'"../../x"'),
    *(b'"_target_"', b'{"_target_":"os.system"}', b"[" * 5000, b"\xff" * 7 + b"\x7f", b"\0" * 8, b"\xff" * 8, b"\xc3("),
    *(
        b"!!python/object/apply:os.system [x]",
        b"&a [*a, *a]",
        b"cos\nsystem\n(S'x'\ntR.",
        b"PK\x03\x04",
        b"\n",
        b"1" * 5000,
    ),
]
SCALAR = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.e+-]*|true|false|null')

OPERATIONS = ("flip", "cut", "insert", "overwrite", "repeat", *["replace"] * 7)  # which leaves most files well-formed

Edits = list[tuple[str, int, int]]


def as_edits(drawn: bytes) -> Edits:
    """Nine bytes each, since drawing them one by one takes longer than reading most files."""
    pieces = [drawn[start : start + 9] for start in range(0, len(drawn) - 8, 9)]
    return [
        (OPERATIONS[piece[0] % 12], int.from_bytes(piece[1:5], "big"), int.from_bytes(piece[5:], "big"))
        for piece in pieces
    ]


edits = st.binary(min_size=9, max_size=45).map(as_edits)


class TooLong(BaseException):
    """Not caught by what catches exceptions."""


class Outside(BaseException):
    """What reading a file must not do."""


def mutated(content: bytes, how: Edits, header: int = 0) -> bytes:
    """`header` is where to look first: half of all edits fall before it."""
    for what, where, more in how:
        end = header if header and more % 2 else len(content)
        place = where % (min(end, len(content)) + 1)
        size = more % 64
        odd = ODD[more % len(ODD)]
        if what == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ 1 << more % 8]) + content[place + 1 :]
        elif what == "cut":
            content = content[:place] + content[place + size :]
        elif what == "insert":
            content = content[:place] + odd + content[place:]
        elif what == "overwrite":
            content = content[:place] + odd + content[place + len(odd) :]
        elif what == "replace" and (scalars := list(SCALAR.finditer(content[:end]))):
            found = scalars[where % len(scalars)]
            content = content[: found.start()] + odd + content[found.end() :]
        elif what == "repeat":
            content = content[:place] + content[place : place + size] * 3 + content[place + size :]
    return content


watched: Path | None = None


def watch(event: str, given: tuple[Any, ...]) -> None:
    if watched is None:
        return
    if event in FORBIDDEN:
        raise Outside(event)
    if event == "open" and isinstance(given[0], str) and isinstance(given[2], int):
        writes = given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not Path(given[0]).resolve().is_relative_to(watched):
            raise Outside(f"{given[0]} opened for writing")


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(watch)


@contextmanager
def bounds(directory: Path) -> Iterator[None]:
    global watched

    def too_long(*_: object) -> None:
        raise TooLong(f"{PROCESSOR_S} s of processor time")

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, PROCESSOR_S)
    watched = directory.resolve()
    try:
        yield
    finally:
        watched = None
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, handler)


def model(**more: object) -> tuple[GPT, Tokenizer]:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_characters(["abc"])
    return GPT(tiny(vocab=tokenizer.vocabulary, layers=1, width=8, heads=2, **more)), tokenizer


def an_export(where: Path) -> Path:
    gpt, tokenizer = model()
    return export.export(gpt, where / "export", tokenizer=tokenizer)


def a_checkpoint(where: Path) -> bytes:
    gpt, tokenizer = model()
    from dataclasses import asdict

    about = {"model": asdict(gpt.config), "precision": "fp32"}
    tensors = {f"model.{name}": tensor for name, tensor in gpt.state_dict().items()}
    tokenizer.save(where / "tokenizer.json")
    checkpoint_file.save(where / "last.ckpt", {"global_step": 3, "state_dict": tensors, "isoforward": about})
    return (where / "last.ckpt").read_bytes()


def resealed(content: bytes, how: Edits) -> bytes:
    """Damage that its author has sealed again. Where not even that can be done, without."""
    changed = mutated(content, how, header=8 + int.from_bytes(content[:8], "little"))
    start = checkpoint_file.DIGEST.start
    if changed[8:start] != checkpoint_file.PREFIX or how[0][1] % 8 == 0:
        return changed
    header = 8 + int.from_bytes(content[:8], "little") + len(changed) - len(content)
    fitting = how[0][2] % 2 and header > start + 64  # the header's length may have changed with the header
    body = changed[8:] if not fitting else changed[8:header] + changed[header:]
    length = (header - 8 if fitting else int.from_bytes(changed[:8], "little")).to_bytes(8, "little")
    blank = length + body[: start - 8] + checkpoint_file.NO_DIGEST + body[start - 8 + 64 :]
    with suppress(ValueError):
        return reseal(blank)
    return changed


def reseal(blank: bytes) -> bytes:
    size = int.from_bytes(blank[:8], "little")
    return sealed(blank[8 : 8 + size], blank[8 + size :]) if size <= len(blank) - 8 else blank


def remanifested(directory: Path) -> None:
    """The manifest's digests made right again, as far as it can still be read."""
    path = directory / "manifest.json"
    with suppress(ValueError, TypeError, AttributeError, LookupError, RecursionError, OSError):
        manifest = json.loads(path.read_text())
        for name in manifest["files"]:
            manifest["files"][name] = sha256_of(directory / Path(name).name)
        manifest["sha256"] = export.digest_of(manifest)
        path.write_text(json.dumps(manifest))


class Kinds:
    """By kind of file: what is written, and what reads it."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.export = an_export(where)
        (where / "run").mkdir()
        self.checkpoint = a_checkpoint(where / "run")
        self.tokenizer = (self.export / "tokenizer.json").read_bytes()
        gpt, _ = model(family="llama")
        self.gguf = gguf_file(where / "model.gguf", gpt).read_bytes()
        place = Environment(id="e", command="c", created="2026", identity={"cpu": "x"}, details={"load": 1.0})
        row = Row(
            experiment="q", life="training", phase="forward", quantity="time", per="step",
            value=1.0, low=0.5, high=2.0, interval="order statistics", confidence=0.95, samples=(0.5, 2.0),
            conditions={"batch": 8}, environment="e",
        )  # fmt: skip
        served = planted.timed("inference", "forward", "step", planted.noisy(1.0), batch=8)
        trained = planted.timed("training", "forward", "step", planted.noisy(2.0), batch=8)
        records: list[Record] = [
            place,
            row,
            planted.compared(trained, served),
            Verdict(experiment="q", trusted=True),
            row,
        ]
        results.write(where / "results.jsonl", records)
        self.results = (where / "results.jsonl").read_bytes()
        self.config = (
            b"model:\n  layers: 2\n  rope_scaling: null\ntracking:\n  tags: [a, b]\noptim:\n  lr: 0.003\nseed: 1\n"
        )

    def read_results(self, how: Edits) -> None:
        path = self.where / "results.jsonl"
        path.write_bytes(mutated(self.results, how))
        found = results.read(path)
        for one in found.comparisons:
            judge(one.ratio.inverse(), margin=one.margin)

    def read_config(self, how: Edits) -> None:
        path = self.where / "config.yaml"
        path.write_bytes(mutated(self.config, how))
        flat(stopping.read_yaml(path))

    def read_tokenizer(self, how: Edits) -> None:
        path = self.where / "tokenizer.json"
        path.write_bytes(mutated(self.tokenizer, how))
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("abca"))

    def read_checkpoint(self, how: Edits) -> None:
        path = self.where / "run" / "last.ckpt"
        path.write_bytes(resealed(self.checkpoint, how))
        checkpoint_file.newest_good(path.parent)
        checkpoint_file.load(path)
        inference.load(path)

    def read_export(self, how: Edits) -> None:
        copied = self.where / "copied"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(self.export, copied)
        names = ["manifest.json", "config.json", "model.safetensors", "tokenizer.json"]
        path = copied / names[how[0][1] % 4]
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
        path.write_bytes(mutated(content, how, header))
        if how[0][2] % 3 == 0:
            (copied / "manifest.json").unlink()  # a directory of Transformers
        else:
            remanifested(copied)
        loading.load_export(copied)

    def read_gguf(self, how: Edits) -> None:
        path = self.where / "model.gguf"
        path.write_bytes(mutated(self.gguf, how, header=2200))
        loading.load(path)


KINDS = [name for name in vars(Kinds) if name.startswith("read_")]
SHARE = {
    "read_results": 30,
    "read_config": 20,
    "read_tokenizer": 15,
    "read_checkpoint": 15,
    "read_export": 10,
    "read_gguf": 10,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return Kinds(tmp_path_factory.mktemp("fuzz"))


def fuzz(read: Callable[[Edits], None], where: Path, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(edits)
    def one(how: Edits) -> None:
        with bounds(where), suppress(Refusal):
            read(how)

    one()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_in_a_file_it_is_read_or_refused(kind: str, kinds: Kinds) -> None:
    fuzz(getattr(kinds, kind), kinds.where, 60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_in_a_hundred_thousand_files_they_are_read_or_refused(kind: str, kinds: Kinds) -> None:
    fuzz(getattr(kinds, kind), kinds.where, int(os.environ.get("ISOFORWARD_FUZZ", "100000")) * SHARE[kind] // 100)
