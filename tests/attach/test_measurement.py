"""From watched steps to rows: what is left out, what is counted, and what is said where too little was seen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isoforward import phase_costs, read
from isoforward.attach import findings
from isoforward.attach.account import TIMED, WARMUP, Step
from isoforward.attach.plain_loop import StepCosts
from isoforward.base.datasheets import Hardware
from isoforward.base.device import CpuDevice


def train(model: Any, steps: int, *, every: int, warmup: int) -> StepCosts:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with phase_costs(model, optimizer, every=every, warmup=warmup) as costs:
        for _ in range(steps):
            model(torch.ones(4, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return costs


def test_rows_are_of_steps_with_as_many_micro_batches_as_most() -> None:
    def step(kind: str, backwards: int) -> Step:
        return Step(kind=kind, seconds=1.0, phases={}, backwards=backwards)

    steps = [step(TIMED, 3), step(TIMED, 3), step(TIMED, 1), step(WARMUP, 1), step(WARMUP, 1)]
    assert findings.alike(steps) == steps[:2]


def test_flops_are_counted_once_by_phase_and_of_the_whole_step() -> None:
    costs = train(nn.Linear(6, 2), 8, every=1, warmup=1)
    flops = {row.phase: row for row in costs.phases.rows if row.quantity == "flops"}
    assert {phase: row.value for phase, row in flops.items()} == {"forward": 96, "backward": 96, "step": 192}
    assert {row.provenance for row in flops.values()} == {"counted"}


def test_flops_of_a_compiled_module_are_unavailable_and_say_why() -> None:
    costs = train(torch.compile(nn.Linear(6, 2), backend="eager"), 8, every=1, warmup=1)
    (row,) = (row for row in costs.phases.rows if row.quantity == "flops")
    assert row.value is None and "compiled" in (row.reason or "")


def test_a_short_training_gives_medians_without_an_interval_and_says_so() -> None:
    costs = train(nn.Linear(6, 2), 5, every=1, warmup=2)
    row = costs.phases.time("training", "forward")
    assert row.value is not None and row.interval is None and len(row.samples) == 2
    assert "2 of 5 steps were timed" in costs.phases.results.verdicts[0].reasons[0]


def test_rows_are_written_and_read_back(tmp_path: Path) -> None:
    costs = train(nn.Linear(6, 2), 12, every=2, warmup=1)
    costs.phases.write(tmp_path / "results.jsonl")
    found = read(tmp_path / "results.jsonl")
    assert found.rows == costs.phases.rows and found.comparisons == costs.phases.results.comparisons
    assert found.comparisons[0].interval == "medians apart"


def test_the_sentence_says_what_a_step_costs_against_its_forward() -> None:
    costs = train(nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)), 12, every=1, warmup=1)
    text = str(costs).splitlines()[-1]
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
    assert f"FLOP/s, {192 / step / 1e6:.1%} of the device's peak" in str(costs)
    monkeypatch.setattr(CpuDevice, "peaks", lambda device: None)
    assert "of the device's peak" not in str(train(nn.Linear(6, 2), 8, every=1, warmup=1))


def test_a_forward_that_fails_in_inference_is_a_row_and_no_error() -> None:
    class TrainsOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("only in training")
            return self.linear(x)  # type: ignore[no-any-return]

    model = TrainsOnly()
    costs = train(model, 8, every=1, warmup=1)
    row = costs.phases.time("inference", "forward")
    assert row.value is None and "RuntimeError: only in training" in str(row.reason)
    assert "A training step takes" in str(costs) and not costs.phases.results.comparisons
    assert model.training


def test_memory_is_counted_by_phase_in_the_same_step() -> None:
    costs = train(nn.Linear(6, 2), 8, every=1, warmup=1)
    memory = {row.phase: row.value for row in costs.phases.rows if row.quantity == "memory"}
    weights, batch, output = 4 * (6 * 2 + 2), 4 * 4 * 6, 4 * 4 * 2
    assert memory["forward"] == weights + batch + output  # gradients are None, SGD has no state
    assert {"forward", "loss", "backward", "optimizer"} <= memory.keys()
