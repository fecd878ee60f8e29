"""The mean cross-entropy of the next token, a slice of the logits at a time.

Written out at once it holds two or three copies of the logits (B, T, V) in fp32, the largest tensors of a small GPT. In
slices it holds none of them, and on a CPU a slice stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from isoforward.base.errors import BadInput
from isoforward.model.footprint import LOSS_SLICE

IGNORED = -100  # a target that counts for nothing, as torch.nn.functional.cross_entropy has it: a prompt, padding
LARGE_SLICE = 2**26  # elements of any device but a CPU, which wants few and large kernels
MOST_ON_META = 32  # slices, of which the memory hardly differs from that of more: a plan is to be there in seconds


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, T, V) or (B, V), targets without the V, to the mean cross-entropy in nats, (); in fp32 always.

    Targets of -100 are left out of the mean, which is NaN where there are no others. BadInput where shapes differ.
    """
    if logits.shape[:-1] != targets.shape:
        raise BadInput(
            f"the loss of the next token takes a target for each row of logits: logits are {tuple(logits.shape)}, "
            f"targets {tuple(targets.shape)}; pass a loss= of your own for others"
        )
    loss: Tensor = SlicedCrossEntropy.apply(logits.flatten(0, -2), targets.flatten())  # type: ignore[no-untyped-call]
    return loss


class SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (N, V), targets (N,) to (). Backward needs both, and the log of each row's sum of exponentials."""
        norms = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        total, count = norms.new_zeros(()), norms.new_zeros(())
        for part, target, norm in slices(logits, targets, norms):
            scores, kept = part.float(), target != IGNORED
            torch.logsumexp(scores, -1, out=norm)
            chosen = scores.gather(-1, target.where(kept, 0)[:, None]).squeeze(-1)
            total += (norm - chosen).where(kept, 0).sum()
            count += kept.sum()
        ctx.save_for_backward(logits, targets, norms, count)
        return total / count

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None]:
        """The softmax, less one at the target, over N; nothing where the target is left out."""
        logits, targets, norms, count = list(ctx.saved_tensors)
        gradients = torch.empty_like(logits)
        share = gradient / count
        for part, target, norm, out in slices(logits, targets, norms, gradients):
            kept = target != IGNORED
            probabilities = (part - norm[:, None]).exp_()  # in fp32, as the norm is
            probabilities[torch.arange(len(target), device=target.device), target.where(kept, 0)] -= 1
            torch.mul(probabilities, (share * kept)[:, None], out=out)
        return gradients, None


def slices(logits: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """On meta those of a CPU, but for MOST_ON_META."""
    size = LOSS_SLICE if logits.device.type in ("cpu", "meta") else LARGE_SLICE
    rows = max(1, size // logits.shape[-1], -(-len(logits) // MOST_ON_META) if logits.is_meta else 0)
    return zip(*(torch.split(each, rows) for each in (logits, *more)), strict=True)
