"""One of each kind of model, small; all of them are the question's own."""

from __future__ import annotations

import dataclasses

import pytest

from experiments.fits import Fits, Trial, answer, apart, limited, planned_bytes, rows, trials
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, only
from isoforward.base.subprocesses import Failed
from isoforward.plan.planning import peak
from isoforward.plan.subject import Setup

OURS = Trial(
    name="small",
    setup=Setup(batch=4, length=128, precision="fp32"),
    ours=ModelConfig(layers=3, heads=4, width=256, vocab=8192, context=128),
)


def test_there_are_twenty_models_and_six_architectures_of_others() -> None:
    found = trials(Fits())
    assert len(found) >= 20
    assert len({trial.theirs for trial in found if trial.theirs}) >= 6
    assert len({trial.name for trial in found}) == len(found)


def test_a_name_that_none_has_is_refused() -> None:
    with pytest.raises(BadInput, match="only=mamba"):
        trials(Fits(only="mamba"))


@pytest.mark.slow
def test_what_fits_finishes_under_that_limit_and_what_does_not_runs_out_of_memory() -> None:
    found = list(rows(OURS))
    assert only(found, quantity="kept", fits="yes").number == 1
    below = only(found, quantity="kept", fits="no")
    assert below.number == 1
    assert "out of memory" in str(below.conditions["outcome"])
    predicted, seen = (only(found, quantity="memory", provenance=how).number for how in ("predicted", "measured"))
    assert peak(predicted).low <= seen <= peak(predicted).high
    said = answer(Results(rows=tuple(found), environments={}, verdicts=()))
    assert said.startswith("Of 1 models, 1 held what was planned")


@pytest.mark.slow
def test_a_plan_that_forgot_the_optimizer_would_not_be_kept() -> None:
    """The same limit, of a plan without Adam's state, is too low for the model: the trial can fail."""
    setup = dataclasses.replace(OURS.setup, optimizer="sgd")
    too_low = planned_bytes(dataclasses.replace(OURS, setup=setup))
    assert isinstance(apart(limited, OURS, round(peak(too_low).low)), Failed)
