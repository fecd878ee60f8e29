"""One process at a time, on any file system: by flock where there is one, else by a marker file."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from isoforward.base.errors import BadInput, StorageFailed

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # network and cloud drives


class InUse(BadInput):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, wait: bool, called: str = "", way_out: str = "choose another") -> Iterator[None]:
    """Holds the lock whose file is `path`, in a directory that is made, and `called` so where it cannot be had.

    InUse where another process holds it, unless told to wait; one that dies lets go of it. StorageFailed where it
    cannot be written.
    """
    called = called or str(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(path, wait=wait)
    except Timeout:
        raise InUse(f"{called} is in use by another run; wait for it or choose another") from None
    except OSError as error:
        raise StorageFailed(f"{called} cannot be written: {error.strerror}; {way_out}") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    try:
        _acquired(path, wait=False).release()
    except Timeout:
        return True
    except OSError:  # read-only: nobody can hold it either
        pass
    return False


def _acquired(path: Path, *, wait: bool) -> BaseFileLock:
    try:
        return _held(FileLock(path, blocking=wait, thread_local=False, fallback_to_soft=False))
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
    return _held(SoftFileLock(path.with_name(f"{path.name}.held"), blocking=wait, thread_local=False))


def _held(lock: BaseFileLock) -> BaseFileLock:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lock.acquire()
    return lock
