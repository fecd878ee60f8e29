"""A training whose every part takes as long as is planted in it, on a clock that nothing else moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from isoforward import phase_costs
from isoforward.attach.account import Account
from isoforward.attach.plain_loop import StepCosts

# Seconds of one call, no two sums of them alike
ITEM, COLLATE, FORWARD, LOSS, BACKWARD, CLIP, UPDATE = 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6
CALLBACK, VALIDATION, CHECKPOINT = 1e7, 1e8, 1e9
BATCH = 2


class PlantedClock:
    """Moves only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def settle(self) -> None: ...

    def take(self, seconds: float) -> None:
        self.now += seconds


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: PlantedClock) -> Tensor:
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.clock.take(BACKWARD)
        return gradients[0], None


class Model(nn.Module):
    def __init__(self, clock: PlantedClock) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.clock = clock
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.take(FORWARD)
        return _Backward.apply(self.dropout(self.linear(x)), self.clock)  # type: ignore[no-any-return]


class Criterion(nn.Module):
    """A loss that is a module: it has no weights, so that it is no forward."""

    def __init__(self, clock: PlantedClock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, y: Tensor) -> Tensor:
        self.clock.take(LOSS)
        return y.square().mean()


class Update(torch.optim.SGD):
    clock: PlantedClock

    def step(self, closure: Any = None) -> Any:
        self.clock.take(UPDATE)  # first: PyTorch calls the hooks of a super().step too, once any SGD has been made
        return super().step(closure)


class Checkpoint:
    """What torch.save takes its time for."""

    def __init__(self, clock: PlantedClock) -> None:
        self.clock = clock

    def __getstate__(self) -> dict[str, object]:
        self.clock.take(CHECKPOINT)
        return {}


class Items(Dataset[Tensor]):
    def __init__(self, clock: PlantedClock, count: int) -> None:
        self.clock, self.count = clock, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError
        self.clock.take(ITEM)
        return torch.linspace(0, 1, 4) + index


def loader(clock: PlantedClock, batches: int) -> DataLoader[Tensor]:
    def collate(items: list[Tensor]) -> Tensor:
        clock.take(COLLATE)
        return torch.stack(items)

    return DataLoader(Items(clock, BATCH * batches), batch_size=BATCH, collate_fn=collate)


def update(model: nn.Module, clock: PlantedClock) -> Update:
    optimizer = Update(model.parameters(), lr=0.1)
    optimizer.clock = clock
    return optimizer


@contextmanager
def slow_clipping(clock: PlantedClock) -> Iterator[None]:
    """In what clip_grad_norm_ calls; `from torch.nn.utils import clip_grad_norm_` has then been done already."""
    original = torch.nn.utils.clip_grad._get_total_norm

    def norm(*args: Any, **kwargs: Any) -> Tensor:
        clock.take(CLIP)
        return original(*args, **kwargs)

    torch.nn.utils.clip_grad._get_total_norm = norm
    try:
        yield
    finally:
        torch.nn.utils.clip_grad._get_total_norm = original


def fetched(batches: int) -> float:
    return batches * (BATCH * ITEM + COLLATE)


def planted(micro_batches: int, **more: float) -> dict[str, float]:
    """What the account of a step of so many micro-batches is, to the digit."""
    own = {"data": fetched(1), "forward": FORWARD, "loss": LOSS, "backward": BACKWARD}
    return {phase: micro_batches * s for phase, s in own.items()} | {"clipping": CLIP, "optimizer": UPDATE} | more


def told(phases: Any) -> dict[str, float]:
    return {phase: seconds for phase, seconds in phases.items() if seconds}


def watched_accounts(monkeypatch: pytest.MonkeyPatch) -> list[Account]:
    """Every account that is opened from here on."""
    accounts: list[Account] = []

    class Noted(Account):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            accounts.append(self)

    monkeypatch.setattr("isoforward.attach.measurement.Account", Noted)
    return accounts


def watched_loop(model: Any, steps: int, *, every: int, warmup: int) -> StepCosts:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with phase_costs(model, optimizer, every=every, warmup=warmup) as costs:
        for _ in range(steps):
            model(torch.ones(4, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return costs
