"""The formulas against the step that runs, and by hand."""

from typing import Any

import pytest
from torch import Tensor

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.base.vocabulary import CONVENTIONS
from isoforward.measure.case import Case
from isoforward.measure.reinforcement import Loop, Shape, step_flops
from isoforward.model import cost
from isoforward.model.grpo_cost import grpo_bytes, grpo_flops
from tests.conftest import tiny


def parity(prompts: Tensor, answers: Tensor) -> Tensor:
    return (answers % 2 == 0).float().mean(1)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("shape", [{}, {"family": "llama", "kv_heads": 2}, {"family": "gpt2", "tied": False}])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_flops_of_the_step_that_runs_are_those_of_the_formula(
    shape: dict[str, Any], optimizer: str, epochs: int
) -> None:
    model = tiny(vocab=10, **shape)
    own = Case(experiment="rl_step", model=model, optim=OptimConfig(name=optimizer))
    steps = Shape(prompts=2, group=3, prompt=4, new_tokens=5, epochs=epochs)
    for convention in CONVENTIONS:
        size = {"batch": 6, "prompt": 4, "new": 5, "epochs": epochs}
        wanted = grpo_flops(model, **size, convention=convention, optimizer=own.rule)
        counted = step_flops(Loop(own, steps, parity), convention)
        assert {phase: count for phase, count in counted.items() if count} == {k: v for k, v in wanted.items() if v}


def test_by_hand_a_step_of_one_epoch_is_six_forwards() -> None:
    """Rollout is one causal forward; old and reference policy one each; the update three."""
    model = ModelConfig(layers=1, heads=1, width=8, context=16, vocab=10)
    found = grpo_flops(model, batch=1, prompt=1, new=8, convention="causal")
    forward = found["forward"]
    assert found["prefill"] + found["decode"] == forward == found["old policy"] == found["reference policy"]
    assert found["backward"] == 2 * forward and found["optimizer"] == 0


def test_bytes_hand_over_every_master_and_every_served_weight() -> None:
    model = tiny()
    moved = grpo_bytes(model, batch=6, prompt=4, new=5, dtype="bf16")
    assert moved["hand-over"] == (4 + 2) * cost.parameters(model).total
    twice = grpo_bytes(model, batch=6, prompt=4, new=5, epochs=2)
    once = grpo_bytes(model, batch=6, prompt=4, new=5)
    assert twice["optimizer"] == 2 * once["optimizer"] and twice["decode"] == once["decode"]
