"""The other life of a module that was just trained: the forwards of one of its steps again, as inference runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from isoforward.base.stopwatch import Clock, spent

WARMUP = 2
REPEATS = 11
UNLIKE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward of a training step: what was called, and with what."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: str
    autocast: torch.dtype | None  # None where it is off

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        device = next(module.parameters()).device.type
        held = tree_map_only(Tensor, Tensor.detach, (args, dict(kwargs)))  # not the graph that led to them
        on = torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if on else None
        return cls(module=module, args=held[0], kwargs=held[1], device=device, autocast=autocast)

    def run(self) -> None:
        kwargs = dict(self.kwargs)
        if isinstance(getattr(type(self.module), "loss_function", None), property):
            kwargs.pop("labels", None)  # inference has no loss
        with torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None):
            self.module(*self.args, **kwargs)


def time_frozen(calls: Sequence[Call], clock: Clock) -> list[float]:
    """Seconds of all `calls` one after the other, in eval mode under inference_mode; modules stay as they were."""

    def run() -> None:
        for call in calls:
            call.run()

    modules = list(dict.fromkeys(call.module for call in calls))
    with unchanged(modules), torch.random.fork_rng([]), torch.inference_mode():
        for module in modules:
            module.eval()
        return [spent(clock, run) for _ in range(WARMUP + REPEATS)][WARMUP:]


@contextmanager
def unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modes, and whatever a forward keeps on a module: a tensor made in inference mode cannot be trained with later."""
    every = {part for module in modules for part in module.modules()}
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in every]
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


def unlike_in_training(modules: Sequence[nn.Module]) -> list[str]:
    """Kinds of layers whose output in eval mode is another one than in training."""
    every = (part for module in modules for part in module.modules())
    kinds = {type(part).__name__ for part in every if isinstance(part, UNLIKE) and getattr(part, "p", True)}
    return sorted(kinds)
