"""Nested Python state with tensors as one file that knows when it is damaged, and that runs nothing when read.

A state file is a safetensors file, so that any tool that knows those can look into it. Its header begins, at a fixed
place, with a digest of the whole file, in which that digest itself counts as zeros: there is no second file that could
be lost, stale or forgotten in a copy. It is the BLAKE2b of the BLAKE2b of each MiB, so that all cores hash while the
disk is busy; without SHA instructions in the processor SHA-256 takes nearly twice as long and is what a save waits for.

Tensors are entries named by their path in the state. All else is JSON in the header, with a tag where JSON has no such
thing: {"$tensor": entry}, {"$tuple": [...]}, {"$dict": [[key, value], ...]}, {"$float": "nan"}.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isoforward.errors import BadInput, Integrity
from isoforward.files.storage import write_atomically

PREFIX = b'{"__metadata__":{"digest":"'
DIGEST = slice(8 + len(PREFIX), 8 + len(PREFIX) + 64)  # where it stands in the file, in hexadecimal
NO_DIGEST = b"0" * 64
PIECE = 2**20
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


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Atomically, each tensor straight from where it is; one that is not on the CPU is copied there by itself.

    A value that is neither tensor nor list, tuple, dict, None, bool, int, float or str is a TypeError that names it.
    """
    flat = Flat()
    skeleton = json.dumps({key: flat.flatten(value, (key,)) for key, value in state.items()}, allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {"digest": NO_DIGEST.decode(), "state": skeleton}}
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

    def flatten(self, value: Any, path: tuple[object, ...]) -> Any:
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
    digests = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for piece in _pieces(chain([memoryview(header)], map(_bytes_of, tensors.values()))):
            file.write(piece)
            digests.append(pool.submit(_digest, piece))
        file.flush()
        os.fsync(file.fileno())  # the disk works while the hash catches up
    file.seek(DIGEST.start)
    file.write(_root(digest.result() for digest in digests))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pieces(parts: Iterable[memoryview]) -> Iterator[memoryview | bytearray]:
    """The same bytes a PIECE at a time, copied only where one spans parts."""
    begun = bytearray()
    for part in parts:
        if begun:
            missing = PIECE - len(begun)
            begun += part[:missing]
            part = part[missing:]
            if len(begun) < PIECE:
                continue
            yield begun
        whole = len(part) // PIECE * PIECE
        for start in range(0, whole, PIECE):
            yield part[start : start + PIECE]
        begun = bytearray(part[whole:])
    if begun:
        yield begun


def _digest(piece: memoryview | bytearray | bytes) -> bytes:
    return blake2b(piece, digest_size=32).digest()


def _digest_at(descriptor: int, index: int) -> bytes:
    piece = os.pread(descriptor, PIECE, index * PIECE)
    return _digest(piece if index else piece[: DIGEST.start] + NO_DIGEST + piece[DIGEST.stop :])


def _root(digests: Iterable[bytes]) -> bytes:
    return _digest(b"".join(digests)).hex().encode()


def verify(path: Path) -> None:
    """Raises Integrity where `path` is not, bit for bit, what `save` wrote; BadInput where it cannot be read."""
    try:
        with path.open("rb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            start = file.read(DIGEST.stop)
            if start[8 : DIGEST.start] != PREFIX:
                raise Integrity(f"{path} is no training checkpoint of isoforward, or its beginning is damaged")
            pieces = range(-(-os.fstat(file.fileno()).st_size // PIECE))
            found = _root(pool.map(partial(_digest_at, file.fileno()), pieces))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    if found != start[DIGEST]:
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


def _unflatten(value: Any, tensor: Callable[[str], Tensor]) -> Any:
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
