"""Injected for real: a writer that fails, a full or read-only filesystem, a limit on the size of files."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from isoforward.base.errors import StorageFailed
from isoforward.base.storage import remove, remove_partials, sha256_of, write_atomically


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", lambda file: file.write(b"hello"))
    assert (tmp_path / "new" / "file").read_bytes() == b"hello"
    assert names(tmp_path / "new") == ["file"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def note(name: str) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given: (order.append((name, path.exists() and path.read_bytes())), real(*given))[1]
        )

    path = tmp_path / "file"
    path.write_bytes(b"old")
    note("fsync")
    write_atomically(path, lambda file: file.write(b"new"))
    assert order == [("fsync", b"old"), ("fsync", b"new")]  # of the file, then of the directory


def test_too_large_a_file_is_a_storage_failure_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before, signal_before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageFailed, match=r"file could not be written: File too large"):
            write_atomically(path, lambda file: file.write(b"x" * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal_before)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_place_that_takes_no_files_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match="below could not be written"):
        write_atomically(tmp_path / "file" / "below", lambda file: file.write(b"x"))


WRITES_TOO_MUCH = """
import sys
from pathlib import Path
from isoforward.base.errors import StorageFailed
from isoforward.base.storage import write_atomically
path = Path(sys.argv[1])
try:
    write_atomically(path, lambda file: file.write(bytes(200_000)))
except StorageFailed as error:
    print(error.__cause__.errno, path.read_bytes(), [p.name for p in path.parent.iterdir()])
"""


@pytest.mark.parametrize(
    ("remount", "reason"), [("", errno.ENOSPC), ("mount -o remount,ro,size=64k small &&", errno.EROFS)]
)
def test_a_full_or_read_only_filesystem_keeps_what_it_had(tmp_path: Path, remount: str, reason: int) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespace to mount a small filesystem in")
    (tmp_path / "small").mkdir()
    mounted = "mount -t tmpfs -o size=64k none small && printf old > small/file &&"
    script = f"{mounted} {remount} {sys.executable} -c '{WRITES_TOO_MUCH}' small/file"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{reason} b'old' ['file']\n", done.stderr


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.ckpt.0a1b2c3d.partial", "a.ckpt", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    remove_partials(tmp_path)
    assert names(tmp_path) == [".hidden", "a.ckpt"]


def test_removing_what_is_gone_is_no_failure(tmp_path: Path) -> None:
    remove(tmp_path / "never")
    with pytest.raises(StorageFailed, match="could not be removed"):
        remove(tmp_path)


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    fips_180_2 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == fips_180_2
