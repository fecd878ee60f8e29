"""Limits that are known in closed form, and a simulation of the same engine."""

from __future__ import annotations

import math
import random

import pytest

from isoforward.plan.queueing import expected


def test_alone_a_request_takes_its_prompt_and_its_steps() -> None:
    found = expected(1e-9, prefill_s=0.1, decode_s=lambda n: 0.02, new_tokens=11)
    assert found.tpot_s == pytest.approx(0.02)
    assert found.whole_s == pytest.approx(0.1 + 0.01 + 10 * 0.02, rel=1e-6)
    assert found.busy == pytest.approx(0, abs=1e-6)


def test_littles_law_holds() -> None:
    found = expected(4.0, prefill_s=0.01, decode_s=lambda n: 0.01 + 0.001 * n, new_tokens=51)
    assert found.together == pytest.approx(4.0 * 50 * found.tpot_s, rel=1e-4)


@pytest.mark.parametrize("rate", [20.0, 9.0])
def test_more_than_can_be_served_is_infinite(rate: float) -> None:
    """Either the prompts alone fill the time, or a step grows with its sequences faster than it serves them."""
    found = expected(rate, prefill_s=0.06, decode_s=lambda n: 0.01 * n, new_tokens=101)
    assert math.isinf(found.whole_s)


def test_it_is_near_a_simulation_of_an_engine_that_batches_as_requests_come() -> None:
    rate, prefill_s, new = 2.0, 0.02, 21

    def decode_s(n: float) -> float:
        return 0.02 + 0.002 * n

    draw, now = random.Random(1), 0.0
    waiting: list[float] = []
    running: list[tuple[float, int]] = []  # when each came, and its steps to go
    whole: list[float] = []
    due = draw.expovariate(rate)
    while len(whole) < 4000:
        while due <= now:
            waiting.append(due)
            due += draw.expovariate(rate)
        if waiting:
            now += prefill_s
            running.append((waiting.pop(0), new - 1))
        elif running:
            now += decode_s(len(running))
            running = [(came, left - 1) for came, left in running]
            whole += [now - came for came, left in running if left == 0]
            running = [one for one in running if one[1]]
        else:
            now = due
    found = expected(rate, prefill_s=prefill_s, decode_s=decode_s, new_tokens=new)
    assert found.whole_s == pytest.approx(sum(whole) / len(whole), rel=0.15)
