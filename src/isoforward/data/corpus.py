"""Text -> documents -> one memmap of tokens, kept under the hash of what it was made from."""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
import numpy.typing as npt

from isoforward.base.caches import cache_directory
from isoforward.base.config import DataConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.locks import locked
from isoforward.base.storage import remove_partials, write_atomically, write_text
from isoforward.base.units import several
from isoforward.data.sources import Source, digest, hub, shakespeare, text_files
from isoforward.data.text import Pieces
from isoforward.data.tokenizer import Tokenizer

FORMAT = 1  # goes up with any change to what the same text becomes, so that no cache outlives it
READING = 2  # goes up with any change to how files become text
GROUP = 1 << 22  # characters encoded in parallel, a shard: bounds what is in memory
LEARN_FROM = 1 << 26  # characters of training text that a tokenizer learns from


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids, documents apart by the tokenizer's end of text where it has one."""

    train: npt.NDArray[np.generic]
    validation: npt.NDArray[np.generic]
    tokenizer: Tokenizer
    bytes_per_token: float | None  # of the validation text: bits per byte = nats / ln 2 / this. None: there is no text
    hash: str  # of text, tokenizer and split
    description: tuple[str, ...]

    def bytes_a_token(self, tokens: npt.NDArray[np.generic]) -> float | None:
        """Of these tokens' text, in which an end of text is none; None where there is no text, as after one token."""
        if self.bytes_per_token is None:
            return None
        return len(self.tokenizer.decode(tokens.tolist()).encode()) / max(1, len(tokens)) or None


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
        source = {"shakespeare": shakespeare, "text": text_files, "hub": hub}[config.source](config)
        corpus = _cached(source, config, tokenizer)
    part, tokens = min((("training", len(corpus.train)), ("validation", len(corpus.validation))), key=lambda p: p[1])
    if tokens <= config.length:
        shorter = f" or write data.length={tokens - 1}" if tokens > 1 else ""
        raise BadInput(
            f"data={config.source}: the {part} part has {several(tokens, 'token')}, data.length={config.length} needs "
            f"at least {config.length + 1}; give more text{shorter}"
        )
    return corpus


class Text(TypedDict):
    """The whole of a corpus, as corpus.json has it."""

    sha256: str
    documents: int
    empty: int
    characters: int
    bytes: int


class Tokens(np.memmap[tuple[int], np.dtype[np.uint16 | np.uint32]]):
    """A worker process opens the file again, where a plain memmap would be copied into it."""

    def __reduce__(self) -> str | tuple[object, ...]:
        if isinstance(self.base, mmap.mmap):  # not a slice of one
            return _open_tokens, (self.filename, self.dtype.str, self.size)
        return super().__reduce__()


def _open_tokens(path: Path, dtype: str, size: int) -> npt.NDArray[np.generic]:
    if size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return Tokens(path, dtype, mode="r", shape=(size,))


def _cached(source: Source, config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    """Two names: the source's stamp, quickly had, leads to the hash of the contents, which names what is kept.

    The same text has the same contents, however it was stored; what was read for it stands with the stamp.
    """
    recipe = tokenizer.sha256 if tokenizer else f"{config.tokenizer}:{config.vocab}"
    kept = cache_directory() if config.cache_dir is None else Path(config.cache_dir).expanduser()
    pointer = kept / f"{digest(READING, source.stamp, recipe, config.validation)[:32]}.json"
    if pointer.is_file():
        met = json.loads(pointer.read_text("utf-8"))
        if (kept / met["corpus"] / "corpus.json").is_file():
            return _open(kept / met["corpus"], source, met["read"])
    text, split = _survey(source, config.validation)
    read = _told(text, source.told())
    name = digest(FORMAT, text["sha256"], recipe, split.rule)
    with locked(kept / name / ".lock", wait=True, way_out="write data.cache_dir= or set XDG_CACHE_HOME"):
        if not (kept / name / "corpus.json").is_file():
            training = _first(_shown(_part(source, split, validation=False), "learning tokens"), LEARN_FROM)
            tokenizer = tokenizer or _trained(config, (piece for piece in source.read() if piece), training)
            _write(kept / name, source, split, text, tokenizer)
    write_text(pointer, json.dumps({"corpus": name, "read": read}))
    return _open(kept / name, source, read)


def _told(text: Text, files: Sequence[str]) -> list[str]:
    empty = f", {text['empty']:,} without text passed over" if text["empty"] else ""
    documents = f"{several(text['documents'], 'document')}{empty}"
    of = f"{documents}, {text['characters']:,} characters, {text['bytes']:,} bytes"
    return [of, *files]


def _survey(source: Source, share: float) -> tuple[Text, Split]:
    """What the text is, and which of it is held out: the documents that the source declares, else those whose own
    hash falls below `share`, else, where they are so few that this misses `share` by a factor of two, the tail.
    """
    whole, one = hashlib.sha256(), hashlib.sha256()
    documents = characters = text_bytes = held_characters = length = document = 0
    held_out = set[int]()
    for piece in _shown(source.read(), "reading"):
        if piece is not None:
            encoded = piece.encode()
            one.update(encoded)
            length += len(piece)
            text_bytes += len(encoded)
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
    text: Text = {
        "sha256": whole.hexdigest(),
        "documents": documents,
        "characters": characters,
        "bytes": text_bytes,
        "empty": document - documents,
    }
    if not characters:
        raise BadInput(f"{source.name}: {several(document, 'document')} with no text, 0 characters")
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


def _trained(config: DataConfig, whole: Iterable[str], training: Iterable[str]) -> Tokenizer:
    """Characters of all the text, so that validation holds no unknown one; BPE of the training part alone."""
    if config.tokenizer == "char":
        return Tokenizer.from_characters(whole)
    return Tokenizer.train_bpe(training, config.vocab)


def _first(pieces: Pieces, characters: int) -> Iterator[str]:
    for piece in pieces:
        if characters <= 0:
            return
        if piece:
            yield piece
            characters -= len(piece)


def _write(directory: Path, source: Source, split: Split, text: Text, tokenizer: Tokenizer) -> None:
    """corpus.json comes last: without it nothing here counts but the shards, which a killed run leaves to the next."""
    remove_partials(directory)
    dtype = _dtype(tokenizer)
    parts = {}
    for part, characters in (("train", text["characters"] - split.characters), ("validation", split.characters)):
        pieces = _shown(_part(source, split, validation=part == "validation"), f"tokenizing {part}", characters)
        shards, counts = _shards(directory / tokenizer.sha256 / part, pieces, tokenizer, dtype)
        sha256 = hashlib.sha256()
        write_atomically(directory / f"{part}.bin", partial(_join, shards=shards, sha256=sha256))
        tokens = (directory / f"{part}.bin").stat().st_size // np.dtype(dtype).itemsize
        parts[part] = {**counts, "tokens": tokens, "sha256": sha256.hexdigest()}
    tokenizer.save(directory / "tokenizer.json")
    told = {"format": FORMAT, "text": text, "split": split.rule, "dtype": dtype, "tokenizer": tokenizer.sha256, **parts}
    write_text(directory / "corpus.json", json.dumps(told, indent=1))
    shutil.rmtree(directory / tokenizer.sha256)


def _shards(directory: Path, pieces: Pieces, tokenizer: Tokenizer, dtype: str) -> tuple[list[Path], dict[str, int]]:
    """A file of tokens for each group of pieces; those that are there already are not tokenized again."""
    shards = list[Path]()
    documents = text_bytes = 0
    begun = False
    for group in _groups(pieces):
        kept = list[str | None]()  # without the ends of empty documents
        for piece in group:
            if piece is not None or begun:
                kept.append(piece)
            documents += piece is None and begun
            text_bytes += len((piece or "").encode())
            begun = piece is not None
        shards.append(directory / f"{len(shards):06d}")
        if not shards[-1].is_file():
            write_atomically(shards[-1], partial(_write_tokens, pieces=kept, tokenizer=tokenizer, dtype=dtype))
    return shards, {"documents": documents, "bytes": text_bytes}


def _write_tokens(file: BinaryIO, *, pieces: list[str | None], tokenizer: Tokenizer, dtype: str) -> None:
    encoded = iter(tokenizer.encode_batch([piece for piece in pieces if piece is not None]))
    end = [] if tokenizer.end is None else [tokenizer.end]
    for piece in pieces:
        file.write(np.array(end if piece is None else next(encoded), dtype).tobytes())


def _join(file: BinaryIO, *, shards: list[Path], sha256: hashlib._Hash) -> None:
    for shard in shards:
        block = shard.read_bytes()
        sha256.update(block)
        file.write(block)


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


def _open(directory: Path, source: Source, read: Sequence[str]) -> Corpus:
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
        **mapped,
        tokenizer=tokenizer,
        bytes_per_token=bytes_per_token,
        hash=directory.name,
        description=(
            f"{source.name}: {train['tokens']:,} tokens to train on, {held['tokens']:,} to validate on",
            *read,
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
        tokenizer = _trained(config, [text], [text])
    size = max(1 << 20, 64 * (config.length + 1))
    ids = generator.integers(0, tokenizer.vocabulary, size, np.int64).astype(_dtype(tokenizer))
    return Corpus(
        train=ids[: size // 2],
        validation=ids[size // 2 :],
        tokenizer=tokenizer,
        bytes_per_token=None,
        hash=digest(FORMAT, "synthetic", seed, tokenizer.sha256, size),
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
