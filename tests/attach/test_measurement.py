"""One step is counted, by phase; rows are written and read back."""

from pathlib import Path

import torch
from torch import nn

from isoforward import read
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
