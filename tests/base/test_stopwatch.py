from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from isoforward.base.stopwatch import Stopwatch
from isoforward.model.gpt import GPT
from isoforward.model.steps import train_step
from tests.conftest import tiny


class Ticking:
    """A clock that a test advances by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def mark(self) -> float:
        return self.now_s

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def settle(self) -> None:
        pass


def test_time_inside_a_phase_is_its_own_and_time_between_phases_is_residual() -> None:
    clock = Ticking()
    watch = Stopwatch(clock)
    with watch.step():
        clock.now_s += 1
        with watch("forward"):
            clock.now_s += 10
        clock.now_s += 2
        with watch("backward"):
            clock.now_s += 20
        clock.now_s += 4
    assert watch.laps() == [{"forward": 10, "backward": 20, "residual": 7, "step": 37}]


def test_a_phase_entered_twice_is_summed_and_one_not_entered_is_absent() -> None:
    clock = Ticking()
    watch = Stopwatch(clock)
    with watch.step():
        for _ in range(2):
            with watch("forward"):
                clock.now_s += 3
    (lap,) = watch.laps()
    assert lap["forward"] == 6
    assert "backward" not in lap


def test_laps_are_given_once() -> None:
    watch = Stopwatch(Ticking())
    with watch.step():
        pass
    assert len(watch.laps()) == 1
    assert watch.laps() == []


@pytest.mark.parametrize("planted", ["forward", "loss", "backward", "optimizer"])
def test_time_planted_in_a_phase_of_the_real_step_is_found_there_and_nowhere_else(
    planted: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still but for what is planted, so that the account is exact."""
    clock = Ticking()
    watch = Stopwatch(clock)

    def late(name: str) -> AbstractContextManager[object]:
        span = watch(name)
        if name != planted:
            return span

        class Late(AbstractContextManager[None]):
            def __enter__(self) -> None:
                span.__enter__()

            def __exit__(self, *error: Any) -> None:
                clock.now_s += 5
                span.__exit__(*error)

        return Late()

    model = GPT(tiny())
    with watch.step():
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), tokens, tokens, phase=late)
    (lap,) = watch.laps()
    assert {phase for phase, time_s in lap.items() if time_s} == {planted, "step"}
    assert lap[planted] == 5
