"""`Trainer(callbacks=[PhaseCosts()])`: phases of any LightningModule's training, automatic or manual optimization."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from isoforward.attach.account import Sampling
from isoforward.attach.measurement import Measurement
from isoforward.base.errors import BadInput
from isoforward.base.stopwatch import Clock
from isoforward.show.phases import Phases


class PhaseCosts(Callback):  # type: ignore[misc]
    """Times data, transfer, forward, loss, backward, clipping, optimizer, logging, validation and checkpointing.

    The trainer's loggers get `phase/<name>_s` every `log_every_n_steps`; `phases` has the rows after `fit`. They are
    appended to `phase_costs/results.jsonl` in the log directory of the trainer, or to `results`.
    """

    def __init__(
        self,
        *,
        every: int = 4,
        warmup: int = 3,
        flops: bool = True,
        results: str | Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.sampling = Sampling(every=every, warmup=warmup, count_flops=flops)
        self.results, self.clock = results, clock
        self.measurement: Measurement | None = None
        self.phases: Phases | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise BadInput("PhaseCosts measures one process: leave it out, or write Trainer(devices=1)")
        self.measurement = Measurement(self.sampling, clock=self.clock)
        hooks = self.measurement.start([pl_module])
        hooks.time(trainer.strategy, "batch_to_device", "transfer")
        hooks.time(pl_module, "configure_gradient_clipping", "clipping")
        hooks.time(calls_of(trainer), "_call_callback_hooks", "logging")
        hooks.time(trainer._logger_connector, "log_metrics", "logging")
        hooks.time(trainer.fit_loop.epoch_loop.val_loop, "run", "validation")
        hooks.time(trainer, "save_checkpoint", "checkpointing")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.measurement is None or not trainer.loggers or trainer.global_step % trainer.log_every_n_steps:
            return
        self.measurement.account.resolve()
        figures = {f"phase/{phase}_s": seconds for phase, seconds in self.measurement.recent().items()}
        for logger in trainer.loggers if figures else ():
            logger.log_metrics(figures, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, frozen=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer, frozen=False)

    def _finish(self, trainer: Trainer, *, frozen: bool) -> None:
        measurement, self.measurement = self.measurement, None
        if measurement is not None:
            path = Path(self.results or Path(trainer.log_dir or trainer.default_root_dir) / "phase_costs/results.jsonl")
            self.phases = measurement.finish(path, frozen=frozen)


def calls_of(trainer: Trainer) -> Any:
    """The module that calls callbacks: lightning.pytorch and pytorch_lightning have one each."""
    loop: Any = sys.modules[type(trainer.fit_loop.epoch_loop).__module__]
    return loop.call
