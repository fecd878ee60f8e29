"""What watching does in steps that are not timed by phase, counted in calls of our own functions: no clock is read."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import isoforward
from isoforward import PhaseCosts, phase_costs
from isoforward.attach import script
from isoforward.attach.sampling import Sampling
from tests.attach import planted_training as plant

OURS = str(Path(isoforward.__file__).parent)
NEVER = 10**9  # steps of which one is timed: after the warm-up none is
FEW = 19  # calls of our functions in a step of one micro-batch, some 5 us
FEW_MORE = 11  # in each further micro-batch
WARMUP, STEPS = 3, 9
SEEN = slice(WARMUP + 2, STEPS - 1)  # the counted step and the one that follows it are no such steps


class Blocks(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def step_is_done() -> None:
    """Called by each loop."""


@contextmanager
def counting() -> Iterator[list[int]]:
    """Calls of functions in isoforward, from one `step_is_done` to the next."""
    calls = [0]

    def see(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls[-1] += frame.f_code.co_filename.startswith(OURS)
            if frame.f_code.co_name == step_is_done.__name__:
                calls.append(0)

    sys.setprofile(see)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def plain(depth: int, accumulate: int) -> None:
    model = Blocks(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = plant.loader(plant.PlantedClock(), STEPS * accumulate)
    with phase_costs(model, optimizer, every=NEVER, warmup=WARMUP):
        for index, batch in enumerate(batches):
            model(batch).sum().backward()
            if (index + 1) % accumulate == 0:
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step_is_done()


def without_loader(depth: int, accumulate: int) -> None:
    model = Blocks(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with phase_costs(model, optimizer, every=NEVER, warmup=WARMUP):
        for index in range(STEPS * accumulate):
            model(torch.ones(2, 4)).sum().backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                step_is_done()


def with_lightning(depth: int, accumulate: int) -> None:
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
                step_is_done()

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
        callbacks=[Steps(), PhaseCosts(every=NEVER, warmup=WARMUP)], **quiet,
    )  # fmt: skip
    trainer.fit(Module(), plant.loader(plant.PlantedClock(), STEPS * accumulate))


def with_transformers(depth: int, accumulate: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from isoforward import PhaseCostsCallback

    class Steps(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_is_done()

    sizes = {"n_layer": depth, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * (STEPS * accumulate)
    arguments = transformers.TrainingArguments(
        "out", per_device_train_batch_size=1, gradient_accumulation_steps=accumulate, use_cpu=True, disable_tqdm=True,
        num_train_epochs=1, report_to=[], save_strategy="no",
    )  # fmt: skip
    callbacks = [Steps(), PhaseCostsCallback(every=NEVER, warmup=WARMUP)]
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()


def script_attached(depth: int, accumulate: int) -> None:
    Path("own.py").write_text(
        f"""
import torch
from tests.attach.test_overhead import Blocks, step_is_done
model = Blocks({depth})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for index, batch in enumerate(torch.utils.data.DataLoader(torch.ones({STEPS * accumulate}, 4))):
    model(batch).sum().backward()
    if (index + 1) % {accumulate} == 0:
        optimizer.step()
        optimizer.zero_grad()
        step_is_done()
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Sampling", partial(Sampling, every=NEVER, warmup=WARMUP))
        script.run_script("own.py", [], Path("run").absolute())


LOOPS = [plain, without_loader, with_lightning, with_transformers, script_attached]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_that_is_not_timed_calls_few_of_our_functions_however_deep_the_model(
    loop: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of_depth = {}
    for depth in (2, 20):
        with counting() as calls:
            loop(depth, 1)
        of_depth[depth] = calls[SEEN]
    assert len(of_depth[2]) == 3
    assert of_depth[2] == of_depth[20]
    assert 0 < max(of_depth[2]) <= FEW


@pytest.mark.parametrize("loop", LOOPS)
def test_micro_batches_cost_few_calls_each(
    loop: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with counting() as calls:
        loop(2, 4)
    assert max(calls[SEEN]) <= FEW + 3 * FEW_MORE
