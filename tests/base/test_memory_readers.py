"""What this process holds, against memory that is planted in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isoforward.base import memory_readers
from isoforward.base.memory_readers import ProcessMemory, held_bytes, why_unreadable
from isoforward.base.subprocesses import run_isolated

SIZE = 64 * 2**20
readable = pytest.mark.skipif(bool(why_unreadable("cpu")), reason="this system does not tell a process' peak")


def planted() -> tuple[int, int, int]:
    """Bytes more than before: while planted memory is held, in the peak after it, and in the peak after a reset."""
    memory = ProcessMemory()
    memory.reset()
    before = memory.now()
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    now = memory.now()
    del tensor
    peak = memory.peak()
    memory.reset()
    return now - before, peak - before, memory.peak() - before


@readable
def test_planted_memory_is_held_while_it_is_there_and_in_the_peak_until_a_reset() -> None:
    held, peak, after = run_isolated(planted)  # where nothing that was freed before is had again
    assert held == pytest.approx(SIZE, rel=0.1)
    assert peak == pytest.approx(SIZE, rel=0.1)
    assert after < SIZE / 2


@readable
def test_held_bytes_are_what_the_process_has_now() -> None:
    assert held_bytes() == pytest.approx(ProcessMemory().now(), rel=0.1)


def test_a_system_without_the_file_or_its_fields_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(memory_readers, "STATUS", status)
    assert held_bytes() == 0
    assert why_unreadable("cpu") == f"{status} cannot be read here, which tells a peak"
    status.write_text("Name: python\n")  # as gVisor has it
    assert held_bytes() == 0
    assert why_unreadable("cpu") == f"{status} cannot be read here, which tells a peak"


def test_a_peak_that_cannot_be_reset_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("VmHWM: 3 kB\nVmRSS: 2 kB\n")
    monkeypatch.setattr(memory_readers, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory_readers, "CLEAR_REFS", tmp_path / "no" / "clear_refs")
    assert (ProcessMemory().now(), ProcessMemory().peak()) == (2048, 3072)
    assert why_unreadable("cpu") == f"{tmp_path / 'no' / 'clear_refs'} cannot be written here, which tells a peak"


def test_of_other_devices_the_allocator_tells() -> None:
    assert why_unreadable("cuda") is None
