"""Held by one, whatever the file system can; let go of by whoever dies."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isoforward.base.errors import StorageFailed
from isoforward.base.locks import InUse, is_locked, locked

ROOT = Path(__file__).parents[2]
fcntl = pytest.importorskip("fcntl")


@pytest.fixture(params=[None, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=["flock", "ENOSYS", "cloud", "nfs"])
def number(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """What flock answers on the file system at hand."""
    if request.param is not None:

        def unsupported(*_: object) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", unsupported)
    return request.param


def test_one_holds_it_and_the_next_has_it_after(number: int | None, tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / ".lock", wait=False):
            assert is_locked(tmp_path / ".lock")
            with pytest.raises(InUse), locked(tmp_path / ".lock", wait=False):
                pytest.fail("two have it")
        assert not is_locked(tmp_path / ".lock")


def test_who_dies_lets_go(number: int | None, tmp_path: Path) -> None:
    code = f"""
import errno, fcntl, os
from pathlib import Path
from isoforward.base.locks import locked
def unsupported(*_):
    raise OSError({number}, "unsupported")
fcntl.flock = unsupported if {number} else fcntl.flock
with locked(Path({str(tmp_path)!r}) / ".lock", wait=False):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, check=False)
    with locked(tmp_path / ".lock", wait=False):
        pass


def test_what_cannot_be_written_is_told_and_held_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(StorageFailed, match="X cannot be written"),
        locked(tmp_path / "file" / ".lock", wait=False, called="X"),
    ):
        pytest.fail("it was had")
    assert not is_locked(tmp_path / "file" / ".lock")
