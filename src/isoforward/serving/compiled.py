"""Decoding through one compiled step: the cache has a fixed shape, so that nothing of the step changes but numbers.

On a GPU the step is recorded as a CUDA graph. The arithmetic is that of the eager step in other kernels: a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once

import torch
from torch import Tensor

from isoforward.model import GPT, KVCache


class StaticKVCache(KVCache):
    """Takes over what `cache` holds. Its position is a tensor, and every slot is looked at, behind a mask."""

    def __init__(self, cache: KVCache) -> None:
        self.slots, self.padding = cache.slots, cache.padding
        self.slots[:, :, :, :, cache.length :] = 0  # masked, but weighted by 0: what memory held before may be NaN
        self.position = torch.tensor([cache.length], device=cache.slots.device)
        self.keys = torch.arange(cache.capacity, device=cache.slots.device)
        if cache.slots.is_cuda:
            from torch._dynamo.decorators import mark_static_address

            for held in (self.slots, self.position):
                mark_static_address(held)  # a recorded graph may write into them

    @property
    def fresh(self) -> bool:
        return False

    def positions(self, count: int) -> Tensor:
        return self.position if self.padding is None else (self.position - self.padding[:, None]).clamp(min=0)

    def mask(self, count: int) -> Tensor:
        past = (self.keys <= self.position)[None]
        return past if self.padding is None else past & (self.keys >= self.padding[:, None, None, None])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        held = self.slots[layer]
        held[0].index_copy_(2, self.position, keys)
        held[1].index_copy_(2, self.position, values)
        return held[0], held[1]

    def advance(self, count: int) -> None:
        self.position += count


def one_more(model: GPT, token: Tensor, cache: StaticKVCache) -> Tensor:
    return model.head(model.trunk(token, cache)[:, -1])


@once
def compiled_decode(device_type: str) -> Callable[..., Tensor]:
    """In place of `steps.decode`, on a StaticKVCache. The first call of each shape compiles, for tens of seconds."""
    mode = "reduce-overhead" if device_type == "cuda" else "default"
    return torch.inference_mode()(torch.compile(one_more, mode=mode))
