"""Which kernels compute the products of few rows and attention's backward: the fastest ones of this machine.

A product of few rows takes as long as reading its weight, and libraries read differently: which of them is fast turns
with the processor, the dtype and the shape. So they are measured (base/choices.py), and PyTorch's plain one stays where
another is not clearly faster, or `kernels=reference` asks for it.

Only a pass of one position a sequence, as decode makes them, takes another kernel than F.linear, and only in a model
that `use_kernels` has prepared. Training's forward is F.linear always, and the frozen forward of several positions has
its bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoforward.base.choices import Choice, Way, fastest, is_reference
from isoforward.base.config import ModelConfig
from isoforward.base.device import device_of
from isoforward.model.attention_kernels import attend_plainly
from isoforward.model.cost import block_matrices

ROWS = (1, 4, 16, 64)  # that kernels are measured at; between two of them, as at the larger
POOL_BYTES = 2**26  # of weights that a measurement reads in turn: more than the caches hold, as a whole model's
POOL = 64  # weights that are enough: a model of smaller ones fits the caches itself
LARGEST = 2**26  # elements of a weight that is measured
PACKED_SHARE = 0.25  # of the free memory that packed copies of all weights may take

FEW = 128  # rows above which a bf16 result on a GPU is padded
PAD = 64  # columns of it: cuBLAS has its fast kernels for multiples of 8, and GPT-2 has 50,257 tokens

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x (rows, in), weight (out, in), bias (out,)
Kernels = Mapping[tuple[int, int, int], str]  # by rows, out and in, where another than F.linear is the fastest


@runtime_checkable
class MultipliesByRows(Protocol):
    """A layer whose products of few rows may take another kernel."""

    weight: nn.Parameter
    few_rows: Mapping[int, Product]


@runtime_checkable
class Attends(Protocol):
    attend: Callable[..., Tensor] | None  # in place of torch's own


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, few_rows: Mapping[int, Product]) -> Tensor:
    """F.linear, by the kernel of `few_rows` where x (..., in) is one position of each of that many sequences."""
    if few_rows and (x.dim() == 2 or x.shape[1] == 1):
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):  # a compiler writes the product itself
            product = few_rows.get(at_rows(x.numel() // x.shape[-1]))
            if product is not None:
                return product(x, weight, bias)
    elif x.is_cuda and x.dtype == torch.bfloat16 and len(weight) % 8 and x.numel() > FEW * x.shape[-1]:
        return padded(x, weight, bias)
    return F.linear(x, weight, bias)


def at_rows(rows: int) -> int:
    """The number of rows that a product of `rows` was measured at; 0 where it has too many."""
    return next((known for known in ROWS if rows <= known), 0)


def padded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What F.linear gives of x (..., in), with weight (out, in) and bias (out,) padded by zeros to a multiple of PAD.

    The result is a view of the first `out` columns.
    """
    missing = -len(weight) % PAD
    y = F.linear(x, F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing)))
    return y[..., : len(weight)]


# The candidates


def mv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.mv(weight, x.view(-1))
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def addmv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.mv(weight, x.view(-1)) if bias is None else torch.addmv(bias, weight, x.view(-1))
    return y.view(*x.shape[:-1], -1)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def packed(weight: Tensor) -> Product:
    """oneDNN on a copy of the weight in the layout that its kernel reads. It does not follow the weight's changes."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS[-1])
    return lambda x, _, bias: onednn(x, copy, bias)


def product_of(name: str, weight: Tensor) -> Product:
    known: dict[str, Product] = {"linear": F.linear, "mv": mv, "addmv": addmv, "onednn": onednn}
    return packed(weight) if name == "packed" else known[name]


def candidates(rows: int, *, copies: bool) -> list[str]:
    names = ["linear", *(["mv", "addmv"] if rows == 1 else [])]
    if torch._C._has_mkldnn:
        names += ["onednn", *(["packed"] if copies else [])]
    return names


# Products of few rows


def shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of each product of a block, and of the head."""
    matrices = [(each.outputs, each.inputs) for each in block_matrices(config)]
    return [*matrices, (config.vocabulary, config.width)]


def kernels_of(config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: Sequence[int]) -> Kernels:
    """The fastest kernels of a decode of so many sequences: measured here where that is not known yet."""
    found: dict[tuple[int, int, int], str] = {}
    if device.type != "cpu" or is_reference():
        return found
    copies = room_for_copies(config, dtype)
    for number in sorted({at_rows(count) for count in rows} - {0}):
        for out, width in shapes(config):
            if out * width <= LARGEST:
                chosen = fastest_product(number, out, width, dtype, copies=copies).chosen
                if chosen != "linear":
                    found[number, out, width] = chosen
    return found


def room_for_copies(config: ModelConfig, dtype: torch.dtype) -> bool:
    *block, head = (out * width for out, width in shapes(config))
    free = device_of("cpu").free_bytes()
    return free is None or dtype.itemsize * (config.layers * sum(block) + head) < PACKED_SHARE * free


def fastest_product(rows: int, out: int, width: int, dtype: torch.dtype, *, copies: bool) -> Choice:
    names = candidates(rows, copies=copies)
    of = {"rows": rows, "out": out, "in": width, "dtype": str(dtype), "ways": names}
    return fastest("product", of, "linear", lambda: timed_products(names, rows, out, width, dtype))


def timed_products(names: Sequence[str], rows: int, out: int, width: int, dtype: torch.dtype) -> dict[str, Way]:
    """Each of `names` on a pool of weights in turn, so that none of them is in the caches from the time before."""
    count = min(POOL, max(1, POOL_BYTES // (out * width * dtype.itemsize)))
    weights = [torch.full((out, width), 0.01, dtype=dtype) for _ in range(count)]
    x, bias = torch.full((rows, width), 0.1, dtype=dtype), torch.full((out,), 0.1, dtype=dtype)

    def way(name: str) -> Way:
        products = [product_of(name, weight) for weight in weights]

        @torch.inference_mode()
        def run() -> float:
            start = time.perf_counter()
            for product, weight in zip(products, weights, strict=True):
                product(x, weight, bias)
            return time.perf_counter() - start

        return run

    return {name: way(name) for name in names}


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """In a frozen model, whose weights stay as they are from now on."""
    for layer in model.modules():
        if isinstance(layer, MultipliesByRows):
            weight = layer.weight
            own = {rows: name for (rows, *shape), name in kernels.items() if tuple(shape) == tuple(weight.shape)}
            products = {name: product_of(name, weight) for name in set(own.values())}  # one packed copy for all rows
            layer.few_rows = {rows: products[name] for rows, name in own.items()}


def named(kernels: Kernels, rows: int) -> str | None:
    """The kernels that a decode of `rows` sequences uses beside F.linear; None where there is none."""
    used = {name for (number, *_), name in kernels.items() if number == at_rows(rows)}
    return ", ".join(sorted(used)) or None


def training_products(config: ModelConfig, rows: int) -> list[tuple[int, int, int, int]]:
    """How many of them, their rows, out and in: those of one forward over `rows` positions."""
    *block, head = ((rows, *shape) for shape in shapes(config))
    return [*((config.layers, *product) for product in block), (1, *head)]


# Attention's backward

BATCH = 4  # sequences that are enough to tell


def use_backward(model: nn.Module, name: str) -> None:
    """`fused`, torch's own, or `plain`. The forward itself stays the same to the bit."""
    if name == "plain":
        for module in model.modules():
            if isinstance(module, Attends):
                module.attend = attend_plainly


def backward_of(config: ModelConfig, dtype: torch.dtype, device: torch.device, *, batch: int, length: int) -> str:
    """fused, or plain where that is faster, which may be so in bf16 on a CPU; for forwards of `batch` sequences."""
    grouped = config.kv_head_count != config.heads
    if dtype != torch.bfloat16 or device.type != "cpu" or config.dropout or grouped or length < 2:
        return "fused"
    shape = (min(batch, BATCH), config.heads, length, config.head_width)
    return fastest("attention", {"shape": shape}, "fused", lambda: timed_backwards(shape)).chosen


def timed_backwards(shape: tuple[int, int, int, int]) -> dict[str, Way]:
    """Forward and backward of attention in bf16, (B, H, T, D)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(4))
    leaves = [each.requires_grad_() for each in (q, k, v)]

    def way(attend: Callable[..., Tensor]) -> Way:
        def run() -> float:
            start = time.perf_counter()
            torch.autograd.grad(attend(*leaves, is_causal=True), leaves, gradient)
            return time.perf_counter() - start

        return run

    return {"fused": way(F.scaled_dot_product_attention), "plain": way(attend_plainly)}
