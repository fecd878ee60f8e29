"""Peaks from datasheets, devices by their whole names, checked files, and the record of where numbers came from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import isoforward
from isoforward.base import hardware
from isoforward.base.device import CpuDevice
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
from isoforward.base.results import refuse_unlike

CPU = torch.device("cpu")


# The table


# Names


# Files


# The environment


def test_the_environment_says_what_must_match_and_what_may_differ() -> None:
    here = environment("python train.py", CPU)
    assert here.identity["torch"] == torch.__version__
    assert here.identity["threads"] == torch.get_num_threads()
    assert here.identity["processors"] == len(os.sched_getaffinity(0))
    assert (here.identity["device"], here.identity["gpu"], here.identity["cuda"]) == ("cpu", None, None)
    assert here.details["affinity"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert datetime.fromisoformat(here.created).utcoffset() is not None


def test_a_change_of_threads_makes_environments_unlike() -> None:
    before, threads = environment("a", CPU), torch.get_num_threads()
    refuse_unlike(before, environment("another command", CPU))
    torch.set_num_threads(threads + 1)
    try:
        after = environment("a", CPU)
    finally:
        torch.set_num_threads(threads)
    assert after.id != before.id
    with pytest.raises(BadInput, match=rf"differ in threads \({threads} and {threads + 1}\)"):
        refuse_unlike(before, after)


def test_nothing_of_the_user_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    here = environment("python /home/alice/work/train.py data.path=/home/alice/secret.txt", CPU)
    assert here.command == "python ~/work/train.py data.path=~/secret.txt"
    shown = json.dumps([here.command, dict(here.identity), dict(here.details)])
    assert "alice" not in shown
    assert os.uname().nodename not in [*here.identity.values(), *here.details.values()]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_our_own_checkout_and_its_changed_files_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        named = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *named, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "src"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "other").touch()
    git("init")
    git("add", "other")
    git("commit", "-m", "somebody else's")
    monkeypatch.setattr(isoforward, "__file__", str(package / "__init__.py"))
    found = environment("", CPU).details
    assert (found["commit"], found["changed"]) == (None, None)
    git("add", ".")
    git("commit", "-m", "ours")
    (package / "new.py").touch()
    found = environment("", CPU).details
    assert (found["commit"], found["changed"]) == (git("rev-parse", "HEAD"), 1)


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
    details = environment("", CPU).details
    assert (details["cpu_limit"], details["memory_limit_bytes"]) == (processors, memory_bytes)


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
    assert environment("", CPU).details["cpu_limit"] == 0.5


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


def test_a_machine_without_proc_and_a_user_without_a_home_have_a_record_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unobtainable(*_: object) -> Any:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(hardware, "read_text", lambda path: None)
    monkeypatch.setattr(os, "getloadavg", unobtainable)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert environment("python train.py", CPU).details["load"] is None


def test_compile_without_a_compiler_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from isoforward.base.hardware import refuse_without_compiler; refuse_without_compiler()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CXX": "/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "BadInput: compile=true needs a C++ compiler, and CXX=/none does not run here" in done.stderr


# Precision


@pytest.mark.parametrize(
    ("capable", "bf16_s", "precision", "why"),
    [
        (False, 0.001, "fp32", "no bf16 instructions"),
        (True, 0.004, "fp32", "2.00 x the time"),
        (True, 0.00195, "fp32", "0.97 x the time"),
        (True, 0.0005, "bf16", "0.25 x the time"),
    ],
)
def test_bf16_is_chosen_only_where_the_machine_has_it_and_it_proves_faster(
    monkeypatch: pytest.MonkeyPatch, capable: bool, bf16_s: float, precision: str, why: str
) -> None:
    def planted(self: CpuDevice, dtype: torch.dtype = torch.float32) -> Callable[[], float]:
        return lambda: {torch.float32: 0.002, torch.bfloat16: bf16_s}[dtype]

    monkeypatch.setattr(CpuDevice, "reference_kernel", planted)
    monkeypatch.setattr(CpuDevice, "multiplies_bf16", lambda self: capable)
    chosen, reason = CpuDevice(CPU).quicker_precision
    assert chosen == precision
    assert why in reason


@pytest.mark.parametrize(
    ("cpuinfo", "capable"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f amx_bf16\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("", False),
    ],
)
def test_bf16_instructions_are_read_from_the_processors_flags(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, capable: bool
) -> None:
    monkeypatch.setattr(hardware, "read_text", lambda path: cpuinfo)
    assert CpuDevice(CPU).multiplies_bf16() is capable


def test_choosing_a_precision_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    assert CpuDevice(CPU).reference_kernel()() > 0
    assert CpuDevice(CPU).reference_kernel(torch.bfloat16)() > 0
    assert torch.equal(torch.get_rng_state(), before)
