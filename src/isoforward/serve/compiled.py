"""Decoding through one compiled step: the cache has a fixed shape, so that nothing of the step changes but numbers.

On a GPU the step is recorded as a CUDA graph. The arithmetic is that of the eager step in other kernels: a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once

import torch
from torch import Tensor

from isoforward.base.device import device_of
from isoforward.model.gpt import GPT, KVCache


class StaticKVCache(KVCache):
    """Takes over what `cache` holds. Its position is a tensor, and every slot is looked at, behind a mask."""

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.padding = cache.keys, cache.values, cache.padding
        device = self.keys[0].device
        self.position = torch.tensor([cache.length], device=device)
        self.places = torch.arange(cache.capacity, device=device)
        for slots in (*self.keys, *self.values):
            slots[:, :, cache.length :] = 0  # masked, but weighted by 0: what memory held before may be NaN
        if device_of(device).records_graphs:
            from torch._dynamo.decorators import mark_static_address

            for held in (*self.keys, *self.values, self.position):
                mark_static_address(held)  # a recorded graph may write into them

    @property
    def length(self) -> int:
        return int(self.position)

    @length.setter
    def length(self, length: int) -> None:
        self.position.fill_(length)

    @property
    def fresh(self) -> bool:
        return False

    def positions(self, count: int) -> Tensor:
        return self.position if self.padding is None else (self.position - self.padding[:, None]).clamp(min=0)

    def mask(self, count: int) -> Tensor:
        past = (self.places <= self.position)[None]
        return past if self.padding is None else past & (self.places >= self.padding[:, None, None, None])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, keys)
        self.values[layer].index_copy_(2, self.position, values)
        return self.keys[layer], self.values[layer]

    def advance(self, count: int) -> None:
        self.position += count


def one_more(model: GPT, token: Tensor, cache: StaticKVCache) -> Tensor:
    return model.head(model.trunk(token, cache)[:, -1])


@once
def compiled_decode(device_type: str) -> Callable[..., Tensor]:
    """In place of `steps.decode`, on a StaticKVCache. The first call of each shape compiles, for tens of seconds."""
    return torch.inference_mode()(torch.compile(one_more, **device_of(device_type).compile_options))
