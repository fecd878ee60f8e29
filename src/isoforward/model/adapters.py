"""Training a part of a model: low-rank maps beside frozen ones (LoRA, Hu 2021), or named parts with the rest frozen.
What is beside low-rank maps can be held in int8: frozen_linear.py.

The `peft` library cannot give our queries and values adapters of their own: they lie in one matrix, and it wraps whole
modules. What is saved is in its format all the same: formats/adapter_format.py.

The forward with an adapter is the same in both lives, and gives the same bits. Merged, W + scale B A is one matrix of
the plain model: its two lives share their bits too, and differ from the adapter's by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoforward.base.config import AdapterConfig
from isoforward.model.adapter_cost import adapted_maps, trained_parts, untied
from isoforward.model.cost import maps
from isoforward.model.frozen_linear import FrozenLinear
from isoforward.model.gpt import GPT, Linear

Kind = TypeVar("Kind", bound=FrozenLinear)

MODULES = {"head": "unembedding"}  # of parts that are called otherwise than their modules


class LowRank(nn.Module):
    """A (rank, in) and B (out, rank). B is 0 at first, so that nothing changes before it is trained."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as Hu's code and PEFT draw it


class AdaptedLinear(FrozenLinear):
    """W x + scale B A x, with an A and a B beside some of the maps that W holds: `rows` are the outputs of each."""

    def __init__(self, base: Linear, rows: dict[str, int], adapted: list[str], adapter: AdapterConfig) -> None:
        super().__init__(base)
        self.rows, self.scale = rows, adapter.scale
        with base.weight.device:
            beside = {name: LowRank(base.in_features, rows[name], adapter.rank) for name in adapted}
        self.low_rank = nn.ModuleDict(beside)

    def pairs(self) -> dict[str, LowRank]:
        """By the name of the map that each is beside."""
        return dict(self.low_rank.items())  # type: ignore[arg-type]  # a ModuleDict does not say of what

    def forward(self, x: Tensor) -> Tensor:
        """One product for all A and one sum, so that what is as large as the outputs is written as little as can be."""
        pairs = self.pairs()
        down = F.linear(x, torch.cat([beside.a for beside in pairs.values()]).to(x.dtype))
        each = dict(zip(pairs, down.chunk(len(pairs), dim=-1), strict=True))
        beside = torch.cat(
            [
                F.linear(each[name], (self.scale * pairs[name].b).to(x.dtype)) if name in each else nothing(x, rows)
                for name, rows in self.rows.items()
            ],
            dim=-1,
        )
        return super().forward(x) + beside

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """W as a product in `dtype` reads it + scale B A, in fp32: (out, in)"""
        base = self.weight if self.scales is None else self.seen_weight(dtype)
        parts = dict(zip(self.rows, base.float().split_with_sizes([*self.rows.values()]), strict=True))
        for name, beside in self.pairs().items():
            parts[name] = parts[name] + self.scale * beside.b.float() @ beside.a.float()
        return torch.cat([*parts.values()])


def nothing(x: Tensor, outputs: int) -> Tensor:
    """Zeros that take no memory, where a map has nothing beside it."""
    return x.new_zeros(()).expand(*x.shape[:-1], outputs)


def adapt(model: GPT, adapter: AdapterConfig) -> GPT:
    """In place: adds what `adapter` adds, and leaves only what it trains with gradients. BadInput where the model has
    no such targets.
    """
    model.adapter = adapter
    if adapter.name == "none":
        return model
    model.requires_grad_(False)
    if adapter.name == "lora":
        add_low_rank(model, adapter)
    else:
        named = trained_parts(model.config, adapter)
        model.config = untied(model.config, adapter)
        if "head" in named:
            model.unembedding.weight = nn.Parameter(model.unembedding.weight.detach().clone())
        for name in named:
            model.get_submodule(MODULES.get(name, name)).requires_grad_()
    return model


def add_low_rank(model: GPT, adapter: AdapterConfig) -> None:
    chosen = adapted_maps(model.config, adapter)
    if adapter.base == "int8":
        hold_in_int8(model)
    for matrix in dict.fromkeys(each.matrix for each in chosen):
        adapted = [each.name for each in chosen if each.matrix == matrix]
        rows = {each.name: each.outputs for each in maps(model.config) if each.matrix == matrix}
        for block in model.blocks:
            base = block.get_submodule(matrix)
            assert isinstance(base, Linear)
            block.set_submodule(matrix, AdaptedLinear(base, rows, adapted, adapter))


def hold_in_int8(model: GPT) -> None:
    """In place, and once: the matrices of every block. Embedding, norms and head stay, as in Dettmers 2023."""
    for matrix in dict.fromkeys(each.matrix for each in maps(model.config)):
        for block in model.blocks:
            base = block.get_submodule(matrix)
            assert isinstance(base, Linear)
            if not isinstance(base, FrozenLinear):
                frozen = FrozenLinear(base)
                frozen.hold_in_int8(model.dtype)
                block.set_submodule(matrix, frozen)


def linears_of(model: GPT, kind: type[Kind]) -> Iterator[tuple[str, Kind]]:
    for path, module in model.named_modules():
        if isinstance(module, kind):
            yield path, module


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, and none of the base."""
    return ".low_rank." in name
