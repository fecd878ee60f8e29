"""One process at a time, on any file system: by flock where there is one, else by a marker file."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # network and cloud drives


class InUse(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock whose file is `path`; raises InUse where another holds it, unless told to wait.

    A process that dies lets go of it. OSError where `path` cannot be written.
    """
    lock = _acquired(path, wait=wait)
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    try:
        _acquired(path, wait=False).release()
    except InUse:
        return True
    except OSError:  # read-only: nobody can hold it either
        return False
    return False


def _acquired(path: Path, *, wait: bool) -> BaseFileLock:
    try:
        try:
            return _held(FileLock(path, blocking=wait, thread_local=False, fallback_to_soft=False))
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        return _held(SoftFileLock(path.with_name(f"{path.name}.held"), blocking=wait, thread_local=False))
    except Timeout:
        raise InUse(str(path)) from None


def _held(lock: BaseFileLock) -> BaseFileLock:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lock.acquire()
    return lock
