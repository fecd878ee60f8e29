"""What watching does in steps that are not timed by phase, counted in calls of its own functions: no clock is read."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from isoforward import PhaseCosts, phase_costs
from isoforward import attach as watching
from tests.attach import planted_training as plant

OURS = str(Path(watching.__file__).parent)
NEVER = 10**9  # steps of which one is timed: after the warm-up none is
FEW = 70  # calls of our functions, some 0.2 ms if each took 3 us: 1 % of a step of 20 ms
WARMUP, STEPS = 3, 8


class Blocks(nn.Module):
    """As deep as asked, with what else models call that is replaced: `to`, an own loss, modules in a list."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Counted:
    """Calls of functions in isoforward/attach, step by step."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def see(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS) and self.calls:
            self.calls[-1] += 1

    @contextmanager
    def counting(self) -> Iterator[Callable[[], None]]:
        sys.setprofile(self.see)
        try:
            yield lambda: self.calls.append(0)
        finally:
            sys.setprofile(None)


def plain(depth: int, accumulate: int, counted: Counted) -> None:
    model = Blocks(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = plant.loader(plant.PlantedClock(), STEPS * accumulate)
    with phase_costs(model, optimizer, every=NEVER, warmup=WARMUP), counted.counting() as next_step:
        for index, batch in enumerate(batches):
            model(batch).sum().backward()
            if (index + 1) % accumulate == 0:
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                next_step()


def without_loader(depth: int, accumulate: int, counted: Counted) -> None:
    model = Blocks(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with phase_costs(model, optimizer, every=NEVER, warmup=WARMUP), counted.counting() as next_step:
        for index in range(STEPS * accumulate):
            model(torch.ones(2, 4)).sum().backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                next_step()


def with_lightning(depth: int, accumulate: int, counted: Counted) -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Blocks(depth)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Steps(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if (index + 1) % accumulate == 0:
                next_step()

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with counted.counting() as next_step:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
            callbacks=[Steps(), PhaseCosts(every=NEVER, warmup=WARMUP)], **quiet,
        )  # fmt: skip
        trainer.fit(Module(), plant.loader(plant.PlantedClock(), STEPS * accumulate))


@pytest.mark.parametrize("loop", [plain, without_loader, with_lightning])
def test_a_step_that_is_not_timed_calls_few_hooks_however_deep_the_model(
    loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of_depth = {}
    for depth in (2, 20):
        counted = Counted()
        loop(depth, 1, counted)
        of_depth[depth] = counted.calls[WARMUP + 1 : STEPS - 1]
    assert len(of_depth[2]) == 3
    assert of_depth[2] == of_depth[20]
    assert 0 < max(of_depth[2]) <= FEW


def test_micro_batches_cost_few_calls_each() -> None:
    counted = Counted()
    plain(2, 4, counted)
    assert max(counted.calls[WARMUP + 1 : STEPS - 1]) <= 4 * FEW
