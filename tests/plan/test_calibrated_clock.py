"""A calibration in which every operator costs a planted millisecond."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import TABLE
from isoforward.measure.case import Case
from isoforward.plan.calibrated_clock import CalibratedClock
from isoforward.plan.forecast import HELD_OUT, PHASES, Beyond, Calibrated, works_of
from isoforward.plan.subject import Known, Serving, Setup

MODEL = ModelConfig(layers=2, heads=2, width=32, vocab=96, context=64)
PLANTED_S = 1e-3
BY = Calibrated(
    operators={},
    reading=[[1.0, 1e30], [1e12, 1e30]],  # nothing but dispatch takes time
    beyond={phase: Beyond(scale=1.0, dispatch_s=PLANTED_S) for life in PHASES.values() for phase in life},
    conditions={"calibration": "planted"},
)
CLOCK = CalibratedClock(TABLE["l4"], BY)


def dispatched(phase: str, *, sequences: int = 1) -> int:
    case = Case(experiment="plan", model=MODEL, batch=4, length=16)
    return round(works_of(case, sequences=sequences)[phase].dispatched)


def test_a_step_is_its_phases_and_accumulating_repeats_all_but_the_update() -> None:
    passes = sum(dispatched(phase) for phase in ("forward", "loss", "backward"))
    once = CLOCK.step(Known(MODEL), Setup(batch=4, length=16, precision="fp32"))
    assert once.value == pytest.approx(PLANTED_S * (passes + dispatched("optimizer")))
    often = CLOCK.step(Known(MODEL), Setup(batch=12, length=16, accumulate=3, precision="fp32"))
    assert often.value == pytest.approx(PLANTED_S * (3 * passes + dispatched("optimizer")))


def test_the_interval_is_that_of_the_errors_on_other_models() -> None:
    decode = CLOCK.decode(Known(MODEL), Serving(users=8, prompt=20, new_tokens=8), 1)
    least, most = HELD_OUT["decode"]
    assert decode.value == pytest.approx(PLANTED_S * dispatched("decode", sequences=8))
    assert (decode.low, decode.high) == (decode.value / (1 + most), decode.value / (1 + least))


def test_an_operator_that_no_calibration_saw_is_said() -> None:
    slow = replace(BY, reading=[[1.0, 1e3], [1e12, 1e3]])
    found = CalibratedClock(TABLE["l4"], slow).prefill(Known(MODEL), Serving(users=1, prompt=20, new_tokens=8), 1)
    assert "outside the calibrated range" in found.doubt
