"""Kernels timed one by one, by a clock that the test moves."""

import pytest

from isoforward.plan.microbenchmarks import OPTIMIZED, PLAN, optimizer_calls, timed_apart

MS = 2**-10  # a power of two: sums of it are exact


class Planted:
    """A clock, and work that takes MS by it; the very first run takes longer."""

    def __init__(self) -> None:
        self.now, self.runs = 0.0, 0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def settle(self) -> None:
        pass

    def work(self) -> None:
        self.now += 0.5 if self.runs == 0 else MS
        self.runs += 1


def test_the_first_run_is_not_counted_and_short_work_is_repeated() -> None:
    planted = Planted()
    samples, found = timed_apart({"work": planted.work}, planted)
    assert samples["work"] == pytest.approx([MS] * int(PLAN.repeats or 0))
    assert planted.runs > 2 + 5  # several executions in each sample of 10 ms
    assert found.samples == PLAN.repeats


def test_an_optimizer_is_timed_at_every_width_of_both_families() -> None:
    operators = [operator for operator, _ in optimizer_calls()]
    assert len(operators) >= 2 * len(OPTIMIZED)
