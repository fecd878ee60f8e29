"""Bytes alive at each phase's peak, against a count by hand."""

import torch
from torch import nn

from isoforward.attach.step_memory import StepMemory

CPU = torch.device("cpu")


def test_peaks_are_counted_as_by_hand_and_freed_tensors_leave_them() -> None:
    model, x = nn.Linear(256, 64, bias=False), torch.ones(8, 256)
    weights, batch, output = 4 * 256 * 64, 4 * 8 * 256, 4 * 8 * 64
    phase = "forward"
    with StepMemory(lambda: phase, CPU, model.parameters()) as memory:
        y = model(x)
        assert memory.peaks == {"forward": weights + batch + output}
        phase = "loss"
        loss = y.sum()
        phase = "backward"
        loss.backward()
        del y
        phase = "optimizer"
        torch.zeros(1)
    assert memory.peaks["backward"] >= 2 * weights + batch + output  # the gradient, and what is freed on the way
    assert memory.peaks["optimizer"] <= 2 * weights + batch + output + 8


def test_views_share_their_storage_and_other_devices_have_their_own() -> None:
    whole = torch.zeros(1000)
    with StepMemory(lambda: "forward", CPU, [whole, None]) as memory:
        whole[:10].add_(1)
        torch.empty(5000, device="meta")
    assert memory.peaks == {"forward": 4000}
