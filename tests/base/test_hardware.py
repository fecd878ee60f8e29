"""Limits of control groups, at whichever level they stand, and the threads that follow from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from isoforward.base import hardware


@pytest.mark.parametrize(
    ("files", "processors", "memory_bytes"),
    [
        ({"cpu.max": "150000 100000\n", "memory.max": "1073741824\n"}, 1.5, 2**30),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ({"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}, 0.5, None),
        ({"cpu.cfs_quota_us": "-1\n", "memory.limit_in_bytes": "9223372036854771712\n"}, None, None),
        ({}, None, None),
    ],
    ids=["version 2", "version 2 without limits", "version 1", "version 1 without limits", "none"],
)
def test_limits_of_the_control_group_are_recorded(
    control_groups: Path, files: dict[str, str], processors: float | None, memory_bytes: int | None
) -> None:
    for name, text in files.items():
        (control_groups / "job" / "step" / name).write_text(text)
    assert (hardware.cpu_limit(), hardware.memory_limit_bytes()) == (processors, memory_bytes)


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of version 2, in which this process is /job/step/task."""
    (tmp_path / "job" / "step" / "task").mkdir(parents=True)
    real = hardware.read_text
    monkeypatch.setattr(hardware, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(
        hardware, "read_text", lambda path: "0::/job/step/task\n" if path == "/proc/self/cgroup" else real(path)
    )
    return tmp_path


@pytest.mark.parametrize("level", ["", "job", "job/step", "job/step/task"])
def test_the_least_limit_holds_at_whichever_level_it_stands(control_groups: Path, level: str) -> None:
    for above in ("", "job", "job/step", "job/step/task"):
        (control_groups / above / "memory.max").write_text("max\n")
        (control_groups / above / "cpu.max").write_text("400000 100000\n")
    (control_groups / level / "memory.max").write_text(f"{2 * 10**9}\n")
    (control_groups / level / "cpu.max").write_text("50000 100000\n")
    assert hardware.memory_limit_bytes() == hardware.memory_bytes() == 2 * 10**9
    assert hardware.cpu_limit() == 0.5


@pytest.mark.parametrize(
    ("quota", "asked", "threads"),
    [("250000", None, "2"), ("50000", None, "1"), ("250000", "3", "3"), ("max", None, None), ("800000", None, None)],
    ids=["two and a half", "half", "asked for", "no quota", "more than there are"],
)
def test_threads_follow_the_quota_unless_they_are_asked_for(
    control_groups: Path, monkeypatch: pytest.MonkeyPatch, quota: str, asked: str | None, threads: str | None
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "processors", lambda: list(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    (control_groups / "job" / "cpu.max").write_text(f"{quota} 100000\n")
    said = hardware.follow_quota()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert (said is None) == (asked is not None or threads is None)
    if said is not None:
        assert said.startswith(f"{threads} thread") and torch.get_num_threads() == int(threads or 0)
    torch.set_num_threads(before)
