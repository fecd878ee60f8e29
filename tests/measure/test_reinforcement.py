from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.base.config import MeasureConfig, OptimConfig
from isoforward.base.errors import BadInput
from isoforward.base.memory_readers import why_unreadable
from isoforward.base.stopwatch import Stopwatch
from isoforward.measure.benchmark import measure
from isoforward.measure.case import Case
from isoforward.measure.reinforcement import PHASES, Loop, Shape, bench, both_ways, memory_rows, rewards_of
from isoforward.model.gpt import GPT
from isoforward.model.grpo_cost import grpo_flops
from tests.conftest import tiny

SHAPE = Shape(prompts=2, group=3, prompt=4, new_tokens=5)
SIXTEEN = Shape(prompts=4, group=4, prompt=4, new_tokens=12)


def case(**more: Any) -> Case:
    return Case(experiment="rl_step", model=tiny(vocab=10), optim=OptimConfig(lr=3e-3), **more)


def parity(prompts: Tensor, answers: Tensor) -> Tensor:
    return (answers % 2 == 0).float().mean(1)


def never(prompts: Tensor, answers: Tensor) -> Tensor:
    return torch.zeros(len(answers))


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
    ratios = {
        (row.conditions["way"], row.conditions["statistic"]): row.number
        for row in rows
        if row.quantity == "importance ratio"
    }
    assert 1 < ratios["usual", "largest"] < 1 + 1e-4  # fp32: decode's last bits alone
    assert ratios["exact", "smallest"] == ratios["exact", "largest"] == 1
    apart = {row.conditions["way"]: row.number for row in rows if row.quantity == "difference"}
    assert apart["exact"] == 0 < apart["usual"] < 1e-4
    assert [part.conditions["way"] for part in made.pairs[1]] == ["exact", "usual"]
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


def test_it_is_told_where_no_step_is_learnt_from_too() -> None:
    with pytest.raises(BadInput, match=r"the reward was 0 for all 30 answers .* larger group="):
        bench(case(), [SHAPE], never)


def test_an_exact_first_ratio_is_1_to_the_bit_in_every_step() -> None:
    usual, exact = both_ways(case(), SIXTEEN, parity)[0]
    for _ in range(3):
        assert torch.equal(exact.step().importance, torch.ones(16, 12))
    assert any((usual.step().importance != 1).any() for _ in range(3))


def in_double(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def summed(rows: int, *operands: Tensor | None, **how: Any) -> Tensor:
        return kernel(*(None if each is None else each.double() for each in operands), **how).float()

    return summed


@pytest.mark.parametrize(
    ("name", "kernel"), [("product_of_rows", F.linear), ("attend_rows", F.scaled_dot_product_attention)]
)
def test_a_kernel_of_other_bits_moves_the_ratio(
    name: str, kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = both_ways(case(), SIXTEEN, parity)[0][1]
    monkeypatch.setattr(f"isoforward.serve.exact.{name}", in_double(kernel))
    assert not torch.equal(exact.step().importance, torch.ones(16, 12))


def test_where_exact_rollout_is_refused_the_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: GPT, rows: int = 0) -> int:
        raise BadInput("no kernel has the bits")

    monkeypatch.setattr("isoforward.measure.reinforcement.use_exact", refused)
    made = bench(case(), [SHAPE], parity)
    measured = measure(made.works, made.pairs, MeasureConfig(repeats=5, warmup=1), seed=1)
    rows = [row for row in made.rows(measured) if row.quantity == "importance ratio"]
    assert [(row.value, row.reason) for row in rows if row.conditions["way"] == "exact"] == [
        (None, "no kernel has the bits")
    ]
    assert len(rows) == 5 and len(made.pairs) == 1


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(BadInput, match="group=1"):
        Shape(group=1)
