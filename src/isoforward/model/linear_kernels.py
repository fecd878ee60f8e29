"""A weight times few rows. It takes as long as reading the weight, and on a CPU the libraries read differently.

In fp32 MKL, behind F.linear and torch.mv, reads with one thread where the processor is AMD's, oneDNN with all. In bf16
torch.addmv may leave the fast path that torch.mv takes, so that a bias is added apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 128  # rows up to which reading the weight is much of what a product takes
LARGE = 2**18  # elements of a weight below which oneDNN's set-up costs more than its threads bring,
A_ROW = 2**15  # and below which, for each row, MKL's quicker arithmetic makes up for its slower reading

PAD = 64  # columns of a bf16 result: cuBLAS has its fast kernels for multiples of 8, and GPT-2 has 50,257 tokens


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What F.linear gives, up to rounding, of x (..., in) of at most FEW rows, weight (out, in) and bias (out,)."""
    if onednn_is_quicker(x, weight):
        product: Callable[..., Tensor] = OneDNN.apply if torch.is_grad_enabled() else onednn
        return product(x, weight, bias)
    *rows, width = x.shape
    if x.numel() != width:
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.view(width))
    return (y if bias is None else y + bias).view(*rows, -1)


def padded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What F.linear gives of x (..., in), with weight (out, in) and bias (out,) padded by zeros to a multiple of PAD.

    The result is a view of the first `out` columns.
    """
    missing = -len(weight) % PAD
    y = F.linear(x, F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing)))
    return y[..., : len(weight)]


def onednn_is_quicker(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # a compiler writes the product itself
    large = weight.numel() >= max(LARGE, A_ROW * (x.numel() // weight.shape[1]))
    return large and x.dtype == torch.float32 and mkl_reads_alone()


@cache
def mkl_reads_alone() -> bool:
    processor = Path("/proc/cpuinfo")
    both = torch._C.has_mkl and torch._C._has_mkldnn
    return both and processor.is_file() and "AuthenticAMD" in processor.read_text()


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class OneDNN(torch.autograd.Function):
    """The same product where its gradient will be asked for, which torch does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (rows, out)
        of_bias = rows.sum(0) if ctx.has_bias else None
        return gradient @ weight, rows.T @ x.flatten(0, -2), of_bias
