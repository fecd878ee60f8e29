"""Decoding that gives the bits of training's forward, whatever the batch and the lengths of its prompts.

A sum of floating-point numbers has an order, and a library chooses it by the shape of its operands. So decoding gives
its kernels rows in multiples of the fewest that have training's bits (`rows`, found by comparing bits on this machine),
and every position's key in its own slot of as many as the context holds, so that attention adds them up in one order.
Training itself stays as it is.

What it equals, bit for bit, is the forward of sequences as long as the model's context: a shorter one is padded at the
right, which causal attention does not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.model.gpt import GPT, KVCache, Linear
from isoforward.model.kernels import ROWS, shapes

CANDIDATES = (4, 8, 16, 32, 64)  # rows: the fewest that have training's bits are taken
SEQUENCES = 4  # of training's forward: a row's bits must not depend on how many there are
TIMES = (1, 2, 3, 7)  # the fewest, that products are tried at


class ExactKVCache(KVCache):
    """Of every sequence, the key of position p lies in slot p of all, and every slot is looked at, behind a mask."""

    def __init__(self, config: ModelConfig, *, batch: int, dtype: torch.dtype, padding: Tensor) -> None:
        super().__init__(config, batch=batch, capacity=config.context, dtype=dtype, padding=padding)
        self.fill(0)  # masked, but weighted by 0: what memory held before may be NaN

    @property
    def fresh(self) -> bool:
        return False

    def own(self, count: int) -> Tensor:
        """Positions (B, T) of the next `count` tokens; those of padding are negative."""
        assert self.padding is not None
        return torch.arange(self.length, self.length + count) - self.padding[:, None]

    def positions(self, count: int) -> Tensor:
        return self.own(count).clamp(min=0)

    def mask(self, count: int) -> Tensor:
        return (torch.arange(self.capacity) <= self.positions(count)[..., None])[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.own(keys.shape[2]) % self.capacity  # padding goes to the last ones, which are written again
        rows = torch.arange(len(slots))[:, None]
        self.keys[layer][rows, :, slots] = keys.transpose(1, 2)
        self.values[layer][rows, :, slots] = values.transpose(1, 2)
        return self.keys[layer], self.values[layer]

    def unpad(self) -> int:
        """Slots hold no padding: only the count of positions shrinks."""
        assert self.padding is not None
        shared = int(self.padding.min())
        self.padding = self.padding - shared
        self.length -= shared
        return shared


def product_of_rows(rows: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x (..., in) as a product of a multiple of `rows` rows, the missing ones zeros."""
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(F.pad(flat, (0, 0, 0, -len(flat) % rows)), weight, bias)
    return y[: len(flat)].view(*x.shape[:-1], -1)


def attend_rows(rows: int, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, **how: object) -> Tensor:
    """scaled_dot_product_attention of q (B, H, T, D) for a multiple of `rows` queries, the last of them repeated."""
    T = q.shape[2]
    if attn_mask is not None and T % rows:
        again = torch.arange(T + -T % rows).clamp(max=T - 1)
        q, attn_mask = q[:, :, again], attn_mask[:, :, again]
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=attn_mask, **how)[:, :, :T]


REASONS = {
    "precision=int8": "rounded weights are another forward",
    "compile=true": "a compiler orders sums anew",
    "lora=": "the products of low-rank maps are not among those whose bits are compared; merge the adapter first",
}


def refuse_inexact(asked: Mapping[str, bool]) -> None:
    """BadInput names the first key that stands in the way."""
    for key in (key for key, is_asked in asked.items() if is_asked):
        raise BadInput(f"exact=true cannot be had with {key}: {REASONS.get(key, 'its kernels were never compared')}")


def use_exact(model: GPT, rows: int = 0) -> int:
    """Prepares a frozen model, and gives the rows that its kernels need; BadInput names one that has no such number.

    `rows` is what it gave for the same shapes before: nothing is compared anew.
    """
    rows = rows or fewest_rows(model.config, model.dtype)
    few_rows = {number: partial(product_of_rows, rows) for number in ROWS}
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.few_rows = few_rows
    for attention in (block.get_submodule("attention") for block in model.blocks):
        attention.attend = partial(attend_rows, rows)  # type: ignore[assignment]  # a module's attribute, as torch types it
    return rows


def padded_length(length: int, rows: int, context: int) -> int:
    """Positions that prompts of `length` take: rows in multiples, in the prompt's products as well."""
    return min(math.ceil(length / rows) * rows, context)


@torch.inference_mode()
def fewest_rows(config: ModelConfig, dtype: torch.dtype) -> int:
    """The fewest rows with which every kernel of `config` gives the bits that training's shapes give here.

    Random numbers alone would not do: in bf16 nearly every sum rounds to one number in any order. So each kernel also
    gets terms that cancel in pairs, whose sum is rounding alone.
    """
    tests = list(kernels(config, dtype, torch.Generator().manual_seed(0)))
    most = min(CANDIDATES[-1], config.context)
    unlike = ""
    for rows in (*(rows for rows in CANDIDATES if rows < most), most):  # a short context itself, as training has it
        unlike = next((name for name, same in tests if not same(rows)), "")
        if not unlike:
            return rows
    raise BadInput(
        f"exact=true is not to be had here: {unlike} of {most} rows or fewer has other bits in {dtype} than that of "
        f"{config.context} positions, which training runs"
    )


def kernels(
    config: ModelConfig, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[int], bool]]]:
    """Each kernel by name, and whether so many rows of it have the bits of training's shape."""
    length = config.context

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def pairs(of: int) -> Tensor:  # (2, of // 2)
        return torch.randperm(of, generator=generator)[: of // 2 * 2].view(2, -1)

    for out, width in sorted(set(shapes(config))):
        weight, bias, x = random(out, width), random(out), random(SEQUENCES * length, width)
        name = f"the product with {out} x {width}"
        yield name, partial(same_product, x, weight, bias, length)
        one, other = pairs(width)
        weight, x = weight.clone(), x.clone()
        weight[:, other], x[:, other] = weight[:, one], -x[:, one]
        yield name, partial(same_product, x, weight, torch.zeros_like(bias), length)
    D, H, K = config.head_width, config.heads, config.kv_head_count
    q, k, v = random(1, H, length, D), random(1, K, length, D), random(1, K, length, D)
    yield "attention", partial(same_attention, q, k, v)
    one, other = pairs(length)
    k, v = k.clone(), v.clone()
    k[:, :, other], v[:, :, other] = k[:, :, one], -v[:, :, one]
    yield "attention", partial(same_attention, q, k, v)


def same_product(x: Tensor, weight: Tensor, bias: Tensor, length: int, rows: int) -> bool:
    """Whether x (N, in) gives the same bits as one sequence, as all of them, and by multiples of `rows` rows."""
    whole = F.linear(x, weight, bias)
    if not torch.equal(F.linear(x[:length], weight, bias), whole[:length]):
        return False
    sizes = [rows * times for times in TIMES if rows * times <= len(x)]
    places = [(at, at + size) for size in sizes for at in (0, (len(x) - size) // 2, len(x) - size)]
    return all(torch.equal(F.linear(x[one:end], weight, bias), whole[one:end]) for one, end in places)


def same_attention(q: Tensor, k: Tensor, v: Tensor, rows: int) -> bool:
    """Whether each query alone, as decode asks it, has the bits that it has among all."""
    length, grouped = k.shape[2], q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    places = torch.arange(length)
    for at in range(length):
        mask = (places <= at)[None, None, None]
        alone = attend_rows(rows, q[:, :, at : at + 1], k, v, attn_mask=mask, enable_gqa=grouped)
        if not torch.equal(alone, y[:, :, at : at + 1]):
            return False
    return True
