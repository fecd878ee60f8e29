"""Kernels timed one by one, by a clock that the test moves."""

import pytest

from isoforward.plan.microbenchmarks import OPTIMIZED, REPEATS, optimizer_calls, timed

MS = 2**-10  # a power of two: sums of it are exact


class Work:
    """Takes MS by the clock of the test; the very first run takes longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.runs = 0
        monkeypatch.setattr("isoforward.plan.microbenchmarks.time.perf_counter", lambda: self.now)

    def __call__(self) -> None:
        self.now += 0.5 if self.runs == 0 else MS
        self.runs += 1


def test_the_first_run_is_not_counted_and_short_work_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    assert timed(work) == pytest.approx(MS)
    assert work.runs == 2 + REPEATS * 2  # two executions fill a sample of 2 ms


def test_the_quickest_sample_may_be_picked_instead_of_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    assert timed(work, min) <= timed(work)


def test_an_optimizer_is_timed_at_every_width_of_both_families() -> None:
    operators = [operator for operator, _ in optimizer_calls()]
    assert len(operators) >= 2 * len(OPTIMIZED)
