"""`Trainer(callbacks=[PhaseCostsCallback()])`: phases of a training with Transformers."""

from __future__ import annotations

from functools import cache, wraps
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from isoforward.attach.measurement import Watching
from isoforward.attach.modules import compiled_from


class PhaseCostsCallback(Watching, TrainerCallback):  # type: ignore[misc]
    """Times data, transfer, forward, loss, backward, clipping, optimizer, logging, validation and checkpointing.

    What the Trainer logs of its steps, to wherever it reports, has `phase/<name>_s` beside it. `phases` has the rows
    after `train`; they are appended to `phase_costs/results.jsonl` in its output directory, or to `results`.
    """

    def prepare(self) -> None:
        close_after_failures()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end(Path(args.output_dir), ended=False)  # what an earlier training left, where it failed
        hooks = self.begin([compiled_from(kwargs["model"])])
        hooks.time(CallbackHandler, "call_event", "logging")  # a class that is asked only some times in a step
        hooks.replace(CallbackHandler, "on_log", self._with_phases(CallbackHandler.on_log))
        hooks.time_always(Trainer, "_evaluate", "validation")
        hooks.time_always(Trainer, "_save_checkpoint", "checkpointing")

    def on_train_end(self, args: Any, state: object, control: object, **kwargs: object) -> None:
        self.end(Path(args.output_dir), ended=True)

    def _with_phases(self, function: Any) -> Any:
        def on_log(handler: Any, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
            if self.measurement is not None and "loss" in logs:  # not an evaluation's, nor the summary at the end
                logs |= self.measurement.figures()
            return function(handler, args, state, control, logs, **kwargs)

        return on_log


@cache
def close_after_failures() -> None:
    """No event tells a callback that training failed, so that the Trainer's loop is wrapped, once and for good."""
    loop = Trainer._inner_training_loop

    @wraps(loop)
    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return loop(trainer, *args, **kwargs)
        finally:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, PhaseCostsCallback):
                    callback.end(Path(trainer.args.output_dir), ended=False)

    Trainer._inner_training_loop = watched
