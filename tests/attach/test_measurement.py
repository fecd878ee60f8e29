"""One step is counted, by phase; rows are written and read back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isoforward import read
from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import Sampling
from tests.attach.planted_training import PlantedClock
from tests.attach.planted_training import watched_loop as train


def test_flops_are_counted_once_by_phase_and_of_the_whole_step() -> None:
    costs = train(nn.Linear(6, 2), 8, every=1, warmup=1)
    flops = {row.phase: row for row in costs.phases.rows if row.quantity == "flops"}
    assert {phase: row.value for phase, row in flops.items()} == {"forward": 96, "backward": 96, "step": 192}
    assert {row.provenance for row in flops.values()} == {"counted"}


def test_flops_of_a_compiled_module_are_unavailable_and_say_why() -> None:
    costs = train(torch.compile(nn.Linear(6, 2), backend="eager"), 8, every=1, warmup=1)
    (row,) = (row for row in costs.phases.rows if row.quantity == "flops")
    assert row.value is None and "compiled" in (row.reason or "")


def test_rows_are_written_and_read_back(tmp_path: Path) -> None:
    costs = train(nn.Linear(6, 2), 12, every=2, warmup=1)
    costs.phases.write(tmp_path / "results.jsonl")
    found = read(tmp_path / "results.jsonl")
    assert found.rows == costs.phases.rows and found.comparisons == costs.phases.results.comparisons
    assert found.comparisons[0].interval == "medians apart"


def test_memory_is_counted_by_phase_in_the_same_step() -> None:
    costs = train(nn.Linear(6, 2), 8, every=1, warmup=1)
    memory = {row.phase: row.value for row in costs.phases.rows if row.quantity == "memory"}
    weights, batch, output = 4 * (6 * 2 + 2), 4 * 4 * 6, 4 * 4 * 2
    assert memory["forward"] == weights + batch + output  # gradients are None, SGD has no state
    assert {"forward", "loss", "backward", "optimizer"} <= memory.keys()


class OfOneDevice(PlantedClock):
    """Knows its own marks alone, as CUDA's events know no time of the processor."""

    def mark(self) -> Any:
        return (self, super().mark())

    def seconds(self, start: Any, end: Any) -> float:
        assert start[0] is end[0] is self
        return float(end[1] - start[1])


@pytest.mark.parametrize("named", [True, False])
def test_every_step_is_timed_by_the_clock_of_one_device(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"cpu": OfOneDevice(), "meta": OfOneDevice()}
    monkeypatch.setattr("isoforward.attach.measurement.device_of", lambda where: clocks[torch.device(where).type])
    model = nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.SGD(model.parameters())
    measurement = Measurement(Sampling(every=10**9, warmup=1, count_flops=False))
    measurement.start([model] if named else [], optimizer)
    for _ in range(6):
        model(torch.ones(1, 2, device="meta")).sum().backward()
        optimizer.step()
    measurement.stop()
    assert measurement.account.clock is clocks["meta"] and len(measurement.account.steps) == 6
