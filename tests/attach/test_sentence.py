"""One line about a watched training."""

import pytest
from torch import nn

from isoforward.base.datasheets import Hardware
from isoforward.base.device import CpuDevice
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
