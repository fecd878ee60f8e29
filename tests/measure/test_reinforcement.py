from typing import Any

import pytest
import torch
from torch import Tensor

from isoforward.base.config import MeasureConfig, ModelConfig, OptimConfig
from isoforward.base.errors import BadInput
from isoforward.base.memory_readers import why_unreadable
from isoforward.base.stopwatch import Stopwatch
from isoforward.base.vocabulary import CONVENTIONS
from isoforward.measure.benchmark import measure
from isoforward.measure.case import Case
from isoforward.measure.reinforcement import PHASES, Loop, Shape, bench, memory_rows, rewards_of, step_flops
from isoforward.model.grpo_cost import grpo_bytes, grpo_flops
from tests.conftest import tiny

SHAPE = Shape(prompts=2, group=3, prompt=4, new_tokens=5)


def case(**more: Any) -> Case:
    return Case(experiment="rl_step", model=tiny(vocab=10), optim=OptimConfig(lr=3e-3), **more)


def parity(prompts: Tensor, answers: Tensor) -> Tensor:
    return (answers % 2 == 0).float().mean(1)


def never(prompts: Tensor, answers: Tensor) -> Tensor:
    return torch.zeros(len(answers))


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
    count = sum(parameter.numel() for parameter in Loop(case(), SHAPE, parity).policy.parameters())
    moved = grpo_bytes(tiny(vocab=10), batch=6, prompt=4, new=5, dtype="bf16")
    assert moved["hand-over"] == (4 + 2) * count
    twice = grpo_bytes(model, batch=6, prompt=4, new=5, epochs=2)
    once = grpo_bytes(model, batch=6, prompt=4, new=5)
    assert twice["optimizer"] == 2 * once["optimizer"] and twice["decode"] == once["decode"]


def test_every_phase_is_timed_and_nothing_lies_between_them() -> None:
    own = case()
    stopwatch = Stopwatch(own.clock)
    lap = stopwatch.lap(Loop(own, SHAPE, parity).step)
    assert set(lap) == {*PHASES, "step"}
    assert sum(lap[phase] for phase in PHASES) == pytest.approx(lap["step"])


def test_the_rows_of_a_bench_are_those_of_its_shapes() -> None:
    other = Shape(prompts=1, group=2, prompt=4, new_tokens=3)
    made = bench(case(), [SHAPE, other], parity)
    measured = measure(made.works, made.pairs, MeasureConfig(repeats=5, warmup=1), seed=1)
    rows = list(made.rows(measured))
    shares = [row for row in rows if row.quantity == "rollout"]
    assert [row.conditions["batch"] for row in shares] == [6, 2]
    assert all(0 < float(row.value or 0) < 1 for row in shares)
    (ratio,) = [row for row in rows if row.quantity == "importance ratio"]
    assert 1 <= float(ratio.value or 0) < 1 + 1e-4  # fp32: decode's last bits alone
    counted = {row.phase: row.value for row in rows if row.quantity == "flops" and row.conditions["batch"] == 6}
    wanted = grpo_flops(case().model, batch=6, prompt=4, new=5)
    assert {phase: counted[phase] for phase in wanted} == wanted


@pytest.mark.skipif(bool(why_unreadable("cpu")), reason="this system does not tell a process' peak")
def test_every_phase_has_its_peak() -> None:
    rows = memory_rows(case(), SHAPE, parity)
    assert [row.phase for row in rows] == list(PHASES[:-1])
    assert {row.life for row in rows if row.phase in ("decode", "hand-over")} == {"inference"}
    assert all(row.value is not None for row in rows)


def test_the_reward_rises() -> None:
    means, _ = rewards_of(case(), Shape(prompts=4, group=8, prompt=2, new_tokens=8), parity, 60)
    assert sum(means[-10:]) / 10 > sum(means[:10]) / 10 + 0.2


def test_a_reward_that_is_never_anything_but_0_is_told_after_the_first_steps() -> None:
    with pytest.raises(BadInput, match="the reward was 0 for all 30 answers of the first 5 steps"):
        rewards_of(case(), SHAPE, never, 50)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(BadInput, match="group=1"):
        Shape(group=1)
