"""What is planted in a phase is found in that phase, in the right amount, and in no other."""

import time
from functools import partial
from typing import Any

import pytest
import torch

from experiments.self_check import LITTLE, SIDE, BothLives, planting
from isoforward.base.vocabulary import PHASES
from isoforward.measure.case import Case
from isoforward.model import steps


@pytest.fixture(scope="module")
def lives() -> Any:
    return BothLives(Case(experiment="planted", model=LITTLE, batch=2, length=48))


@pytest.fixture(scope="module")
def matrix() -> Any:
    return torch.ones(SIDE, SIDE)


def more(count: Any, planted_in: Any) -> Any:
    without, with_ = count("nowhere"), count(planted_in)
    return {phase: with_.get(phase, 0) - without.get(phase, 0) for phase in PHASES}


@pytest.mark.parametrize("planted_in", PHASES)
def test_a_planted_product_is_counted_in_its_phase_alone(lives: Any, matrix: Any, planted_in: Any) -> None:
    found = more(partial(lives.flops, partial(torch.mm, matrix, matrix)), planted_in)
    assert found == {phase: 2 * SIDE**3 * (phase == planted_in) for phase in PHASES}


@pytest.mark.parametrize("planted_in", PHASES)
def test_a_planted_tensor_that_stays_is_found_in_its_phase_alone(lives: Any, matrix: Any, planted_in: Any) -> None:
    kept = []
    found = more(partial(lives.retained, lambda: kept.append(matrix.clone())), planted_in)
    assert found == {phase: 4 * SIDE**2 * (phase == planted_in) for phase in PHASES}


@pytest.mark.parametrize("planted_in", PHASES)
def test_work_planted_in_a_phase_runs_within_it(lives: Any, planted_in: Any) -> None:
    """On a clock that only planted work moves, so that the machine has no say."""
    now = 0

    class PlantedClock:
        def mark(self) -> Any:
            return now

        def seconds(self, start: Any, end: Any) -> Any:
            return float(end - start)

        def settle(self) -> None:
            pass

    def work() -> None:
        nonlocal now
        now += 7

    lives.stopwatch.clock = PlantedClock()
    found = lives.stopwatch.lap(partial(lives.run_with, work, planted_in))
    assert found == {"residual": 0.0, "step": 7.0} | {phase: 7.0 * (phase == planted_in) for phase in PHASES}


def test_nothing_is_planted_where_it_was_not_asked_for() -> None:
    def never() -> None:
        raise AssertionError

    with planting(never, "backward", steps.unmeasured)("forward"):
        time.sleep(0)
