"""Settings of one training step, each against the first."""

from __future__ import annotations

from dataclasses import replace

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.base.vocabulary import TRAINING
from isoforward.measure.case import Case
from isoforward.measure.variants import bench, state_row
from isoforward.model import cost

MODEL = ModelConfig(layers=1, heads=2, width=16, context=32, vocab=32)
FIRST = Case(experiment="x", model=MODEL, batch=2, length=16, labels={"change": "none"})
OTHERS = [replace(FIRST, checkpointing="full", labels={"change": name}) for name in ("one", "two")]


def test_every_phase_of_every_case_is_compared_with_the_same_of_the_first() -> None:
    built = bench(FIRST, [FIRST, *OTHERS])
    compared = [(a.conditions["change"], a.phase, b.conditions["change"], b.phase) for a, b in built.pairs]
    phases = {(name, phase, "none", phase) for name in ("one", "two") for phase in (*TRAINING, "step")}
    assert len(compared) == len(phases)
    assert set(compared) == phases
    assert len(built.works) == 6  # of each case the phased step and the whole


def test_what_an_optimizer_keeps_is_read_from_it() -> None:
    """Adam: two moments in fp32, and the count of steps of each parameter."""
    matrices, parameters = 2 + 4, cost.parameters(MODEL).total  # both tables, four products
    row = state_row(replace(FIRST, optim=OptimConfig(name="adamw")))
    assert row.value is not None
    steps = row.value - 8 * parameters
    assert steps % 4 == 0
    assert steps // 4 >= matrices
    assert state_row(replace(FIRST, optim=OptimConfig(name="sgd", momentum=0.9))).value == 4 * parameters
    assert state_row(replace(FIRST, optim=OptimConfig(name="sgd", momentum=0.0))).value == 0
