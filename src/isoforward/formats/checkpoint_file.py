"""Nested Python state with tensors as one file that knows when it is damaged, and that runs nothing when read.

A state file is a safetensors file, so that any tool that knows those can look into it. Its header begins, at a fixed
place, with the BLAKE3 of the whole file, in which the digest itself counts as zeros: there is no second file that could
be lost, stale or forgotten in a copy. A save would wait for SHA-256, which processors without instructions for it
compute more slowly than a disk writes (experiments/saving.py).

Tensors are entries named by their path in the state. All else is JSON in the header, with a tag where JSON has no such
thing: {"$tensor": entry}, {"$tuple": [...]}, {"$dict": [[key, value], ...]}, {"$float": "nan"}.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import write_atomically
from isoforward.formats.untrusted import is_pickle, never_opened

PREFIX = b'{"__metadata__":{"digest":"'
DIGEST = slice(8 + len(PREFIX), 8 + len(PREFIX) + 64)  # where it stands in the file, in hexadecimal
NO_DIGEST = b"0" * 64
PIECE = 2**22  # read at once
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(path: Path, state: Mapping[str, object]) -> None:
    """Atomically, each tensor straight from where it is; one that is not on the CPU is copied there by itself.

    A value that is neither tensor nor list, tuple, dict, None, bool, int, float or str is a TypeError that names it.
    """
    flat = Flat()
    skeleton = json.dumps({key: flat.flatten(value, (key,)) for key, value in state.items()}, allow_nan=False)
    header: dict[str, object] = {"__metadata__": {"digest": NO_DIGEST.decode(), "state": skeleton}}
    end = 0
    for name, tensor in flat.tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, partial(_write, len(text).to_bytes(8, "little") + text, flat.tensors))


class Flat:
    """A state taken apart into tensors and what JSON can say."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[object, str] = {}  # of views of the same memory: tied tensors are one entry

    def flatten(self, value: object, path: tuple[object, ...]) -> object:
        match value:
            case Tensor() if value.dtype in DTYPES:
                return {"$tensor": self.entry(value, "/".join(map(str, path)))}
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else {"$float": str(value)}
            case list():
                return [self.flatten(item, (*path, index)) for index, item in enumerate(value)]
            case tuple():
                return {"$tuple": self.flatten(list(value), path)}
            case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.flatten(item, (*path, key)) for key, item in value.items()}
            case dict():
                return {"$dict": [[self.flatten(key, path), self.flatten(v, (*path, key))] for key, v in value.items()]}
        what = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"a checkpoint cannot hold {'/'.join(map(str, path))}, a {what}")

    def entry(self, tensor: Tensor, name: str) -> str:
        memory = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        view = (*memory, tensor.dtype, tensor.shape, tensor.stride())
        if view not in self.entries:
            while name in self.tensors or name == "__metadata__":
                name += "'"
            self.entries[view] = name
            self.tensors[name] = tensor
        return self.entries[view]


def _write(header: bytes, tensors: Mapping[str, Tensor], file: BinaryIO) -> None:
    digest = blake3()
    with ThreadPoolExecutor(1) as hashing:
        for part in chain([memoryview(header)], map(_bytes_of, tensors.values())):
            hashed = hashing.submit(digest.update, part)
            file.write(part)
            hashed.result()
    file.seek(DIGEST.start)
    file.write(digest.hexdigest().encode())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def is_checkpoint(path: Path) -> bool:
    """Whether `path` begins as what `save` writes; whether it is whole is verified when it is loaded."""
    if path.is_file():
        with suppress(OSError), path.open("rb") as file:
            return file.read(DIGEST.start)[8:] == PREFIX
    return False


def verify(path: Path) -> None:
    """Raises Integrity where `path` is not, bit for bit, what `save` wrote; BadInput where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(DIGEST.stop)
            if start[8 : DIGEST.start] != PREFIX:
                if is_pickle(start):
                    raise never_opened(path)
                raise Integrity(f"{path} is no training checkpoint of isoforward, or its beginning is damaged")
            digest = blake3(start[: DIGEST.start] + NO_DIGEST)  # its threads would not outlive a fork
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest().encode() != start[DIGEST]:
        raise Integrity(f"{path} is damaged: its contents do not match the digest written in it; use an earlier one")


def load(path: Path, *, only: Container[str] | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` was given, or of its outermost keys `only` those; verified first, and raises as `verify` does."""
    verify(path)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            # safetensors gives the file itself, mapped, which would change when the file does
            tensor = cache(lambda name: file.get_tensor(name).clone())
            skeleton = json.loads(file.metadata()["state"])
            return {key: _unflatten(value, tensor) for key, value in skeleton.items() if only is None or key in only}
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Integrity(f"{path} is whole, but no state that isoforward wrote: {error}") from error


def _unflatten(value: object, tensor: Callable[[str], Tensor]) -> object:
    match value:
        case {"$tensor": name}:
            return tensor(name)
        case {"$tuple": items}:
            return tuple(_unflatten(item, tensor) for item in items)
        case {"$dict": pairs}:
            return {_unflatten(key, tensor): _unflatten(item, tensor) for key, item in pairs}
        case {"$float": text}:
            return float(text)
        case dict():
            return {key: _unflatten(item, tensor) for key, item in value.items()}
        case list():
            return [_unflatten(item, tensor) for item in value]
    return value


def newest_good(directory: Path) -> Path | None:
    """The undamaged .ckpt of the highest global_step; warns of every damaged one it passes over."""
    for path in sorted(directory.glob("*.ckpt"), key=_claimed_step, reverse=True):
        try:
            verify(path)
        except (Integrity, BadInput) as damage:
            warnings.warn(f"passed over a checkpoint: {damage}", stacklevel=2)
        else:
            return path
    return None


def _claimed_step(path: Path) -> float:
    """Only for the order, so nothing is verified; what cannot be read comes first and is then warned of."""
    try:
        with safe_open(path, "pt") as file:
            return int(json.loads(file.metadata()["state"])["global_step"])
    except Exception:
        return math.inf
