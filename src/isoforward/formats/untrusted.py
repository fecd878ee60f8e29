"""What files of strangers say, believed only as far as it has been checked; in bounded memory, and running nothing."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isoforward.base.checks import LARGEST
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import TEXT_LIMIT, read_json

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ORIGIN = ("source", "path")  # what a ModelConfig says of where it came from
LINE = 120  # characters
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
DESCRIBE = reprlib.Repr()  # never walks the whole of a large value
DESCRIBE.maxstring = DESCRIBE.maxother = LINE


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file, before its numbers are read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in a file or directory, in whatever format, with its tensors under Transformers' names."""

    where: Path
    config: ModelConfig
    tensors: Mapping[str, Stored]


def shown(value: object) -> str:
    """Whatever a stranger's file says, shortened and escaped, for one line of a message."""
    text = DESCRIBE.repr(value)
    return text if len(text) <= LINE else f"{text[:LINE]}..."


def harmless(text: str) -> str:
    """For a terminal: control characters that could move its cursor, or worse, are spelled out."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def described(config: ModelConfig) -> dict[str, object]:
    """What `checked` turns back into `config`, as far as it is about the model and not about where it came from."""
    return {name: value for name, value in asdict(config).items() if name not in ORIGIN and value is not None}


def checked(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from JSON that nobody vouches for: known keys, right types, sizes that a model can have."""
    hints = {name: hint for name, hint in get_type_hints(ModelConfig).items() if name not in ORIGIN}
    for key, value in values.items():
        if key not in hints:
            raise BadInput(f"{shown(key)} is not a setting of a model")
        if hints[key] is Any:
            continue  # ModelConfig looks at it itself
        kinds = {get_origin(kind) or kind for kind in get_args(hints[key]) or (hints[key],)}
        if type(value) not in (kinds | {int} if float in kinds else kinds):
            raise BadInput(f"model.{key}={shown(value)} is not of the right type")
        if type(value) is int and abs(value) > (LARGEST if int in kinds else 2**63):
            raise BadInput(f"model.{key}={shown(value)} is more than any model has ({LARGEST})")
    return ModelConfig(**values)


def names_in(directory: Path) -> set[str]:
    """Whatever a manifest or an index lists must be one of these, so that none leads out of the directory."""
    if directory.is_file():
        return {directory.name}
    return {path.name for path in directory.iterdir() if path.is_file()}


def open_tensors(directory: Path) -> dict[str, Stored]:
    """Those of model.safetensors, or of the files that an index lists; of a pickle, never."""
    names = names_in(directory)
    if "model.safetensors" in names:
        return open_file(directory / "model.safetensors")
    if "model.safetensors.index.json" in names:
        return open_shards(directory / "model.safetensors.index.json", names)
    if pickled := [name for name in sorted(names) if Path(name).suffix in PICKLED]:
        raise never_opened(directory / pickled[0])
    raise BadInput(f"{directory} holds no model.safetensors")


def never_opened(path: Path) -> BadInput:
    return BadInput(f"{path} is a pickle, which can run code, and is never opened; use safetensors")


def is_pickle(start: bytes) -> bool:
    """Of what torch.save wrote, a ZIP archive, or of a pickle itself, of protocol 2 or later."""
    return start.startswith((b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"))


def refuse_other_formats(path: Path, start: bytes) -> None:
    """Of a file that begins so, and is often given or found in place of weights."""
    if is_pickle(start):
        raise never_opened(path)
    if start.startswith(b"version https://git-lfs"):
        raise Integrity(f"{path} is a pointer of Git LFS and holds no weights; fetch them with: git lfs pull")
    if start.lstrip().startswith(b"{"):
        raise BadInput(f"{path} is JSON and holds no weights; name its directory, {path.parent}")
    if start.lstrip().startswith(b"<"):
        raise Integrity(f"{path} is a web page and holds no weights; download the file itself")


def open_shards(index: Path, names: set[str]) -> dict[str, Stored]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise Integrity(f"{index} has no weight_map")
    shards = {}
    for shard in sorted(set(places.values())):
        if shard not in names:
            raise Integrity(f"{index} lists {shown(shard)}, which is not there")
        shards[shard] = open_file(index.parent / shard)
    for name, shard in places.items():
        if name not in shards[shard]:
            raise Integrity(f"{index} has {shown(name)} in {shard}, where it is not")
    return {name: shards[shard][name] for name, shard in places.items()}


def open_file(path: Path) -> dict[str, Stored]:
    """The library refuses overlaps, holes and trailing bytes itself, but not a header of up to 100 MB."""
    try:
        with path.open("rb") as beginning:
            start = beginning.read(64)
        header_bytes = int.from_bytes(start[:8], "little")
        if header_bytes > TEXT_LIMIT:
            refuse_other_formats(path, start)
            raise Integrity(f"{path} claims a header of {header_bytes} bytes; none needs {TEXT_LIMIT}")
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Integrity(f"{path} is not a safetensors file: {shown(str(error))}") from error
    tensors = {}
    for name, part in slices.items():
        read = partial(file.get_tensor, name)
        tensors[name] = Stored(file=path, shape=tuple(part.get_shape()), dtype=part.get_dtype(), read=read)
    return tensors
