"""What is alive at every moment of a step, not at its peaks alone: the peaks of a deeper model follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isoforward.measure.flops import Overload
from isoforward.measure.memory_ledger import Block, Watch
from isoforward.model.cost import Parts

HELD = {"parameters": "weights", "buffers": "weights", "weights": "weights", "gradients": "gradients"}


class Moment(NamedTuple):
    operator: object  # that ends there; None where a phase begins
    held: Parts  # weights, gradients, activations: bytes


class Timeline(Watch):  # type: ignore[no-untyped-call]
    """Births and deaths of storages are kept, and added up once every storage has its name."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, device)
        self.events: list[tuple[Block, int]] = []
        self.ends: list[tuple[str, object, int]] = []  # phase, operator, events until then
        self.operator: object = None

    def hold(self, tensor: Tensor, kind: str = "embedding") -> Block | None:
        known = len(self.live)
        block = super().hold(tensor, kind)
        if block is not None and len(self.live) > known:
            self.events.append((block, block.size))
        return block

    def release(self, key: int) -> None:
        self.events.append((self.live[key], -self.live[key].size))
        super().release(key)

    def note_peak(self, workspace: int = 0) -> None:
        self.ends.append((self.scope.phase, self.operator, len(self.events)))

    def __torch_dispatch__(
        self, operator: Overload, types: object, args: object = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        self.operator = operator
        return super().__torch_dispatch__(operator, types, args, kwargs)

    def moments(self) -> dict[str, list[Moment]]:
        """By phase."""
        phases: dict[str, list[Moment]] = {}
        held, seen = {"weights": 0, "gradients": 0, "activations": 0}, 0
        for phase, operator, end in self.ends:
            for block, size in self.events[seen:end]:
                held[HELD.get(block.name or "", "activations")] += size
            seen = end
            phases.setdefault(phase, []).append(Moment(operator, Parts(held)))
        phases.pop("outside", None)
        return phases
