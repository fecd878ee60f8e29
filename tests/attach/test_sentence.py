"""One line about a watched training."""

from typing import Any

import pytest
import torch
from torch import nn

from isoforward import phase_costs
from isoforward.attach.plain_loop import StepCosts
from isoforward.attach.sentence import sentence
from isoforward.base.datasheets import Hardware
from isoforward.base.device import CpuDevice
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, row_of
from tests.attach.planted_training import watched_loop as train


def test_the_sentence_says_what_a_step_costs_against_its_forward() -> None:
    costs = train(nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)), 12, every=1, warmup=1)
    text = " ".join(str(costs).partition("\n\n")[2].split())
    assert text.startswith("A training step takes") and "its forward in inference" in text
    assert "Outputs in training mode differ" in text and text.endswith("because of Dropout.")


def test_the_rate_is_held_against_the_peak_where_one_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Hardware(
        name="x", peak_flops_per_s={"fp32": 1e6}, bandwidth_bytes_per_s=1.0, memory_bytes=1.0, source="planted"
    )
    monkeypatch.setattr(CpuDevice, "peaks", lambda device: known)
    costs = train(nn.Linear(6, 2), 8, every=1, warmup=1)
    step = costs.phases.time("training", "step").value
    assert step is not None
    assert f"FLOP/s, {192 / step / 1e6:.1%} of the device's peak" in " ".join(str(costs).split())
    monkeypatch.setattr(CpuDevice, "peaks", lambda device: None)
    assert "of the device's peak" not in str(train(nn.Linear(6, 2), 8, every=1, warmup=1))


def of_steps(step_s: float, **phases_s: float) -> str:
    rows = [
        row_of("attach", life="training", phase=phase, quantity="time", per="step", value=seconds)
        for phase, seconds in {"step": step_s, **phases_s}.items()
    ]
    return sentence(Results(rows=tuple(rows), environments={}, verdicts=()))


def test_shares_are_of_the_step_that_is_named_or_of_those_timed_by_phase() -> None:
    assert of_steps(0.010, forward=0.002, backward=0.005, residual=0.003) == (
        "A training step takes 10.0 ms; 50% of it is backward."
    )
    assert of_steps(0.020, forward=0.002, backward=0.005, residual=0.003) == (
        "A training step takes 20.0 ms; of those timed by phase, 10.0 ms each, 50% is backward."
    )


def why(costs: StepCosts) -> str:
    return " ".join(str(costs).partition("No training step was timed: ")[2].split())


def test_why_no_step_was_timed_is_said() -> None:
    model, other = nn.Linear(6, 2), nn.Linear(6, 2)
    assert why(train(model, 4, every=4, warmup=3)).startswith(
        "of 4 optimizer steps the first 4 are left out as warm-up"
    )
    with phase_costs(model, torch.optim.SGD(other.parameters())) as unnamed:
        torch.optim.SGD(model.parameters()).step()
    assert why(unnamed) == "the SGD that was named never stepped, and another optimizer did."
    with phase_costs(model) as by_hand:
        for _ in range(3):
            model(torch.ones(4, 6)).sum().backward()
    assert why(by_hand) == "no optimizer of torch.optim stepped after 3 calls of backward."
    with phase_costs(model) as idle:
        pass
    assert why(idle).startswith("nothing was trained")


def test_no_interval_is_blamed_on_every_1() -> None:
    (reason,) = train(nn.Linear(6, 2), 4, every=1, warmup=1).phases.results.verdicts[0].reasons[:1]
    assert reason == "2 of 4 steps were timed, too few for an interval: train longer"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda m, o: phase_costs(o, m), "model is a SGD, and no torch.nn.Module"),
        (lambda m, o: phase_costs(m, m), "optimizer is a Linear, which has no step"),
        (lambda m, o: phase_costs(m, o, every=0), "every=0 must be a finite number of at least 1"),
        (lambda m, o: phase_costs(m, o, warmup=-1), "warmup=-1 must be"),
    ],
)
def test_wrong_arguments_are_refused_before_the_training(wrong: Any, said: str) -> None:
    model = nn.Linear(6, 2)
    with pytest.raises(BadInput, match=said):
        wrong(model, torch.optim.SGD(model.parameters()))
