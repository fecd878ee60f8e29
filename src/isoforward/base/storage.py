"""Files that are either wholly there or not at all, whatever is killed or fills up while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from isoforward.base.errors import BadInput, Integrity, StorageFailed

DONE = ".done"  # marks the directory of a run or sweep that finished; of a run it holds the digest of config.yaml
TIME_IS_UP = ".time_is_up"  # and its training was ended by time, before its last step: it can be gone on with

TEXT_LIMIT = 4 * 2**20  # bytes of a JSON file or of a safetensors header: far above any real one


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write` fills a temporary beside `path`, which takes its name only once all of it is on the disk.

    The temporary can be read and sought in too. Any OSError becomes a StorageFailed that names `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb+") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageFailed(
            f"{path} could not be written: {error.strerror or error}. What was there before still is; "
            "make room or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Atomically, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def sync_directory(directory: Path) -> None:
    """Makes names as lasting as what they name, where the system can: Windows and some network drives cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Gone afterwards, whether it was there or not."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailed(f"{path} could not be removed: {error.strerror}") from error


def remove_partials(directory: Path) -> None:
    """What writers killed in mid-write left; only for who alone writes into `directory`."""
    for left in directory.glob(".*.partial"):
        remove(left)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """An object that nobody vouches for; Integrity where it is none."""
    try:
        with path.open("rb") as file:
            text = file.read(TEXT_LIMIT + 1)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text) if len(text) <= TEXT_LIMIT else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise Integrity(f"{path} is not a JSON object of at most {TEXT_LIMIT} bytes")
    return content
