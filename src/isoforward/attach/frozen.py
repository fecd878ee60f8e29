"""The other life of a module that was just trained: the forwards of one of its steps again, as inference runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from isoforward.attach.modules import computes_its_loss, innermost
from isoforward.base.stopwatch import Clock, spent
from isoforward.model import steps

WARMUP = 2
REPEATS = 11


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward of a training step: what was called, and with what."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    autocast: torch.dtype | None  # None where it is off

    @classmethod
    def of(cls, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Call:
        device = next(module.parameters()).device
        on = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if on else None
        held = {name: without_graph(value) for name, value in kwargs.items()}
        return cls(module=module, args=tuple(map(without_graph, args)), kwargs=held, device=device, autocast=autocast)

    def run(self) -> object:
        kwargs = dict(self.kwargs)
        if computes_its_loss(innermost(self.module)):
            kwargs.pop("labels", None)  # inference has no loss
        with self.precision():
            return self.module(*self.args, **kwargs)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    @property
    def prompt(self) -> Tensor | None:
        """Tokens (1, T) of a causal LM of Transformers, one fewer than trained on; None of any other module."""
        generates = getattr(self.module, "can_generate", None)
        tokens = self.kwargs.get("input_ids", self.args[0] if self.args else None)
        config = getattr(self.module, "config", None)
        if generates is None or not generates() or getattr(config, "is_encoder_decoder", False):
            return None
        return tokens[:1, :-1] if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] > 2 else None


def without_graph(value: object) -> object:
    """Not what led to it: the graph of a step would stay with it."""
    if isinstance(value, Tensor):
        return value.detach()
    return value if value is None else tree_map_only(Tensor, Tensor.detach, value)


def time_frozen(calls: Sequence[Call], clock: Clock) -> list[float]:
    """Seconds of all `calls` one after the other, in eval mode under inference_mode; modules stay as they were."""

    def run() -> None:
        for call in calls:
            call.run()

    with frozen(calls):
        return [spent(clock, run) for _ in range(WARMUP + REPEATS)][WARMUP:]


def time_serving(call: Call, clock: Clock) -> dict[str, list[float]]:
    """Seconds of the prefill of one sequence, and of the decode of the token after it. Empty of other modules."""
    prompt = call.prompt
    if prompt is None:
        return {}
    from isoforward.serve.transformers_model import Wrapped, WrappedCache

    model = Wrapped(call.module)
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    with frozen([call]), call.precision():
        cache = WrappedCache(model)
        for _ in range(WARMUP + REPEATS):
            cache.rewind(0)
            seconds["prefill"].append(spent(clock, lambda: steps.prefill(model, prompt, cache)))
            cache.rewind(prompt.shape[1])
            seconds["decode"].append(spent(clock, lambda: steps.decode(model, prompt[:, -1:], cache)))
    return {phase: samples[WARMUP:] for phase, samples in seconds.items()}


@contextmanager
def frozen(calls: Sequence[Call]) -> Iterator[None]:
    """The modules of these calls as inference has them. Afterwards they and the random state are what they were."""
    modules = list(dict.fromkeys(call.module for call in calls))
    devices = {call.device for call in calls if call.device.type == "cuda"}
    with unchanged(modules), torch.random.fork_rng(devices), torch.inference_mode():
        for module in modules:
            module.eval()
        yield


@contextmanager
def unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modes, and whatever a forward keeps on a module: a tensor made in inference mode cannot be trained with later."""
    every = {part for module in modules for part in module.modules()}
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in every]
    values = [(buffer, buffer.clone()) for _, _, held in before for buffer in held.values() if buffer is not None]
    try:
        yield
    finally:
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)
        for buffer, value in values:
            if not torch.equal(buffer, value):  # a running mean, which a forward in training mode writes in place
                buffer.copy_(value)
