"""`Trainer(callbacks=[PhaseCosts()])`: phases of any LightningModule's training, automatic or manual optimization."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from isoforward.attach.account import FORWARD
from isoforward.attach.measurement import Watching
from isoforward.attach.modules import compiled_in_place


class PhaseCosts(Watching, Callback):  # type: ignore[misc]
    """Times data, transfer, forward, loss, backward, clipping, optimizer, logging, validation and checkpointing.

    The trainer's loggers get `phase/<name>_s` every `log_every_n_steps`; `phases` has the rows after `fit`. They are
    appended to `phase_costs/results.jsonl` in the log directory of the trainer, or to `results`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hooks = self.begin([pl_module])
        if compiled_in_place(pl_module):  # forward and loss are then one graph
            hooks.time_always(pl_module, "training_step", FORWARD)
        else:
            hooks.replace_while_timed(pl_module, "training_step", hooks.within_forward(pl_module.training_step))
        hooks.time(trainer.strategy, "batch_to_device", "transfer")
        hooks.time(pl_module, "configure_gradient_clipping", "clipping")
        hooks.time(calls_of(trainer), "_call_callback_hooks", "logging")
        hooks.time(trainer._logger_connector, "log_metrics", "logging")
        hooks.time_always(trainer.fit_loop.epoch_loop.val_loop, "run", "validation")
        hooks.time_always(trainer, "save_checkpoint", "checkpointing")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """At the steps, and at the place on the x axis, where the trainer's own figures are."""
        connector = trainer._logger_connector
        whole = not (pl_module.automatic_optimization and trainer.fit_loop._should_accumulate())
        if self.measurement is not None and trainer.loggers and whole and connector.should_update_logs:
            connector.log_metrics(self.measurement.figures())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end(Path(trainer.log_dir or trainer.default_root_dir), ended=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end(Path(trainer.log_dir or trainer.default_root_dir), ended=False)


def calls_of(trainer: Trainer) -> object:
    """The module that calls callbacks: lightning.pytorch and pytorch_lightning have one each."""
    loop = sys.modules[type(trainer.fit_loop.epoch_loop).__module__]
    call: object = loop.call
    return call
