"""The mean cross-entropy of the next token, a slice of the logits at a time.

Written out at once it holds two or three copies of the logits (B, T, V) in fp32, the largest tensors of a small GPT. In
slices it holds none of them, and on a CPU a slice stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SLICE = {"cpu": 2**20, "meta": 2**20}  # elements: what a cache holds; counting on meta is of the same slices
LARGE_SLICE = 2**26  # of any other device, which wants few and large kernels


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, T, V), targets (B, T) to the mean cross-entropy in nats, (); in fp32 whatever the logits are."""
    loss: Tensor = SlicedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten())  # type: ignore[no-untyped-call]
    return loss


class SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (N, V), targets (N,) to (). Backward needs both, and the log of each row's sum of exponentials."""
        norms = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        total = norms.new_zeros(())
        for part, chosen, norm in slices(logits, targets, norms):
            scores = part.float()
            torch.logsumexp(scores, -1, out=norm)
            total += (norm - scores.gather(-1, chosen[:, None]).squeeze(-1)).sum()
        ctx.save_for_backward(logits, targets, norms)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The softmax, less one at the target, over N."""
        logits, targets, norms = ctx.saved_tensors
        gradients = torch.empty_like(logits)
        share = gradient / len(logits)
        for part, chosen, norm, out in slices(logits, targets, norms, gradients):
            probabilities = (part - norm[:, None]).exp_()  # in fp32, as the norm is
            probabilities[torch.arange(len(chosen), device=chosen.device), chosen] -= 1
            torch.mul(probabilities, share, out=out)
        return gradients, None


def slices(logits: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, SLICE.get(logits.device.type, LARGE_SLICE) // logits.shape[-1])
    return zip(*(torch.split(each, rows) for each in (logits, *more)), strict=True)
