"""A linear that is not trained, with its weight as it was or in int8, so that an adapter's base takes a quarter.

Each output has a scale, its largest weight over 127. A product reads codes times scales in the activations' dtype, made
anew in the forward and in the backward: made once and kept, they would take the memory that int8 saves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from isoforward.model.gpt import Linear

LARGEST = 127


class FrozenLinear(Linear):
    """On the weight and bias of `base`. `scales` (out, 1) are there where the weight is int8."""

    def __init__(self, base: Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scales: nn.Parameter | None = getattr(base, "scales", None)

    @torch.no_grad()
    def hold_in_int8(self, dtype: torch.dtype) -> None:
        """Rounds what a forward in `dtype` sees of the weight, so that masters and their export give one result."""
        seen = self.weight.to(dtype).float()
        scales = scales_of(seen)
        self.weight = nn.Parameter((seen / scales).round().to(torch.int8), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def seen_weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), as a product in `dtype` reads it."""
        return self.weight.to(dtype) if self.scales is None else decoded(self.weight, self.scales, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.scales is None:
            return super().forward(x)
        return Int8Product.apply(x, self.weight, self.scales, self.bias)  # type: ignore[no-any-return, no-untyped-call]


def scales_of(weight: Tensor) -> Tensor:
    """(out, in) in fp32 to (out, 1): the largest of each output becomes the code 127."""
    return (weight.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=1e-12)


def decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * scales.to(dtype)


class Int8Product(torch.autograd.Function):
    """F.linear, whose backward keeps the codes and passes a gradient to x alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, decoded(codes, scales, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = list(ctx.saved_tensors)
        return gradient @ decoded(codes, scales, gradient.dtype), None, None, None
