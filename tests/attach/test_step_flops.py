"""FLOPs of products, convolutions and attention against a hand count; results are what they are without it."""

import torch
from torch import nn
from torch.nn import functional as F

from isoforward.attach.step_flops import StepFlops


def test_forward_and_backward_of_a_linear_layer() -> None:
    layer, x, phase = nn.Linear(3, 5), torch.randn(7, 3), ["forward"]
    with StepFlops(lambda: phase[0]) as counted:
        loss = layer(x).sum()
        phase[0] = "backward"
        loss.backward()
    assert counted.flops == {"forward": 2 * 7 * 3 * 5, "backward": 2 * 7 * 3 * 5}  # the weights' alone: x needs none


def test_convolution_and_attention() -> None:
    layer, q = nn.Conv2d(2, 4, 3, bias=False), torch.randn(1, 2, 5, 8)
    with StepFlops(lambda: "forward") as counted, torch.no_grad():
        layer(torch.randn(1, 2, 6, 6))
        convolution = counted.flops["forward"]
        F.scaled_dot_product_attention(q, q, q)
    assert convolution == 2 * (4 * 4) * 4 * (2 * 3 * 3)
    assert counted.flops["forward"] - convolution == 4 * 2 * 8 * 5 * 5


def test_what_is_computed_stays_the_same() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), torch.randn(9, 16)
    expected = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    with StepFlops(lambda: "forward"):
        found = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
