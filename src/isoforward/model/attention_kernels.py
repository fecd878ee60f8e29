"""Causal attention whose backward is plain matrix products, for training in bf16 on a CPU.

There the fused backward can take several times as long as the products that it saves memory over. The forward is the
fused kernel's either way, to the bit: it is what both lives share.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of scaled_dot_product_attention, which it asks wherever no plain backward is written."""
    written = is_causal and q.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if written and attn_mask is None and dropout_p == 0 and not enable_gqa:
        y: Tensor = PlainBackward.apply(q, k, v)  # type: ignore[no-untyped-call]
        return y
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa
    )


class PlainBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, D) thrice to (B, H, T, D)"""
        y, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, norms)  # norms (B, H, T): the log of each row's sum of exponentials
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """FlashAttention (Dao 2022, appendix B.2), over the whole square of one sequence at a time."""
        q, k, v, y, norms = list(ctx.saved_tensors)
        scale = 1 / math.sqrt(q.shape[-1])
        of_q, of_k, of_v = (torch.empty_like(each) for each in (q, k, v))
        for n in range(len(q)):
            scores = (q[n] @ k[n].mT).float() * scale  # (H, T, T)
            weights = (scores - norms[n, :, :, None]).exp_().tril_()
            of_v[n] = weights.to(v.dtype).mT @ gradient[n]
            own = (gradient[n].float() * y[n]).sum(-1, keepdim=True)  # (H, T, 1)
            of_scores = ((gradient[n] @ v[n].mT).float() - own).mul_(weights).mul_(scale).to(q.dtype)
            of_q[n] = of_scores @ k[n]
            of_k[n] = of_scores.mT @ q[n]
        return of_q, of_k, of_v
