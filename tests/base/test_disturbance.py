"""What the system says of a busy processor, and what it does not say where there is no /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isoforward.base import disturbance
from isoforward.base.disturbance import Disturbance, between, busiest, look, process_times_s

LINUX = pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="the kernel keeps no schedstat here")


@contextmanager
def hogs() -> Iterator[None]:
    """One for each processor, so that we have to wait for one."""
    count = len(os.sched_getaffinity(0)) + 1
    each = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.3)
    try:
        yield
    finally:
        for hog in each:
            hog.kill()
            hog.wait()


def busy(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@LINUX
def test_a_hog_on_every_processor_disturbs_and_is_seen_to_use_them() -> None:
    usage = process_times_s()
    with hogs():
        before = look()
        busy(0.3)
        found = between(before, look())
        name, time_s = busiest(usage, process_times_s())
    assert found.disturbed
    assert found.run_delay_s > 0.05
    assert found.others_s > 0.1
    assert name
    assert time_s > 0.1


def test_the_busiest_is_the_one_that_used_most_in_between() -> None:
    before = {(1, "init"): 50.0, (7, "hog"): 1.0}
    assert busiest(before, {(1, "init"): 50.5, (7, "hog"): 4.0, (9, "new"): 2.0}) == ("hog", 3.0)


def test_one_tick_of_stolen_time_is_rounding_and_two_are_not() -> None:
    assert not Disturbance(elapsed_s=0.1, stolen_s=0.01).disturbed
    assert Disturbance(elapsed_s=0.1, stolen_s=0.02).disturbed


def test_without_proc_nothing_is_known_and_nothing_disturbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disturbance, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    before = look()
    assert (before.run_delay_s, before.stolen_s, before.busy_s) == (None, None, None)
    assert not between(before, look()).disturbed
    assert process_times_s() == {}
    assert busiest({}, {}) == ("", 0.0)
