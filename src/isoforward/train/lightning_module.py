"""Training's life under Lightning: manual optimization, so that the step that runs is `steps.train_step` itself.

Under automatic optimization Lightning wraps forward and backward in `optimizer_step`, and its own profilers then
report all three as one.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from isoforward.base.config import OptimConfig, TrainerConfig
from isoforward.base.device import device_of
from isoforward.base.errors import NonFinite
from isoforward.base.stopwatch import Stopwatch
from isoforward.model.gpt import GPT
from isoforward.model.loss import next_token_loss
from isoforward.model.optim import build, learning_rate, set_learning_rate
from isoforward.model.steps import train_step
from isoforward.train.distributed import shard, travelling
from isoforward.train.pace import Pace

RECENT = 20  # steps that the live display averages over


class LitGPT(LightningModule):  # type: ignore[misc]
    """What dropout draws is a function of (seed, step, rank), as batches are: nothing else that draws, and no stop
    and resume, can change it.
    """

    def __init__(self, model: GPT, optim: OptimConfig, trainer: TrainerConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optim = optim
        self.plan = trainer
        self.seed = seed
        self.stopwatch = Stopwatch(device_of("cpu"))
        self.recent: deque[dict[str, float]] = deque(maxlen=RECENT)  # seconds by phase, a training step each
        self.waits_s: deque[float] = deque(maxlen=RECENT)  # for the data of those steps
        self.pace = Pace()
        self.loss = torch.tensor(math.nan)  # of the step before
        self.restored_step: object = 0
        self.begun = False  # a step is done: whatever was restored has proven itself

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)  # type: ignore[no-any-return]

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build(self.model, self.optim)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """What the weights are, so that they can be served from the checkpoint alone."""
        model = self.model
        about = {"model": asdict(model.config), "precision": model.precision, "adapter": asdict(model.adapter)}
        checkpoint["isoforward"] = about

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        self.restored_step = checkpoint["global_step"]

    def on_train_start(self) -> None:
        if self.global_step != self.restored_step:
            raise ValueError(f"its state is of step {self.global_step}, and it says {self.restored_step}")
        optimizer = self.optimizers()
        for parameter, state in optimizer.optimizer.state.items():  # fused updates look no further than the weights
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape != (() if name == "step" else parameter.shape):
                    raise ValueError(f"its optimizer holds {name} of {[*value.shape]} for {[*parameter.shape]}")

    def on_fit_start(self) -> None:
        clock = device_of(self.device)
        self.stopwatch, self.pace = Stopwatch(clock), Pace(clock.settle)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        optimizer = self.optimizers()
        step = self.global_step
        torch.manual_seed(int(np.random.Philox(key=[self.seed, step << 16 | self.global_rank]).random_raw() >> 1))
        set_learning_rate(optimizer.optimizer, learning_rate(step, self.optim, self.plan.max_steps))
        left = self.plan.accumulate

        def backward(loss: Tensor) -> None:
            """Gradients travel between processes once a step, with the last micro-batch."""
            nonlocal left
            left -= 1
            with travelling(self.trainer.strategy, left == 0):
                self.manual_backward(loss)

        with self.stopwatch.step():
            try:
                loss, norm = train_step(
                    self.model,
                    optimizer,
                    *batch,
                    accumulate=self.plan.accumulate,
                    clip=self.optim.clip,
                    backward=backward,
                    phase=self.stopwatch,
                )
            except RuntimeError as error:
                if "non-finite" not in str(error):
                    raise
                raise NonFinite(
                    f"the gradient at step {step} is not finite; the weights were left as they were. "
                    f"Try a smaller optim.lr (now {self.optim.lr:g})"
                ) from error
        self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # the gradient's, before it is cut
        self.loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self.pace.step_done()
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.begun = True
        if self.device.type == "cpu" or self.global_step % RECENT == 0:
            self.recent.extend(self.stopwatch.laps())

    def on_validation_start(self) -> None:
        self.pace.pause()

    def on_validation_end(self) -> None:
        self.pace.resume()

    def on_train_end(self) -> None:
        self.pace.pause()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        tokens, targets = batch
        loss = next_token_loss(self.model(tokens), targets)
        self.log("validation_loss", loss, batch_size=len(tokens), sync_dist=True)


def quieten() -> None:
    """Lightning advises on what is meant here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


class Timed:
    """A loader whose every wait is a phase of its own."""

    def __init__(self, batches: Iterable[object], waits_s: deque[float]) -> None:
        self.batches, self.waits_s = batches, waits_s

    def __iter__(self) -> Iterator[object]:
        clock = device_of("cpu")
        batches = iter(self.batches)
        while True:
            start = clock.mark()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waits_s.append(clock.seconds(start, clock.mark()))
            yield batch
