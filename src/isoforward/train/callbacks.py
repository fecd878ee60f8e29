"""Training as it goes: on a terminal a live panel, in a log a line per validation, figures for the tracker, a trace."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from isoforward.base.config import TrainConfig
from isoforward.base.datasheets import lookup
from isoforward.base.device import device_of
from isoforward.base.memory_readers import why_unreadable
from isoforward.base.vocabulary import PHASES
from isoforward.model import cost
from isoforward.train.lightning_module import LitGPT
from isoforward.train.pace import Pace, told_loss


class LiveTracker(Protocol):
    def live(self, step: int, metrics: Mapping[str, float]) -> object: ...


COLOURS = {"forward": "cyan", "loss": "green", "backward": "magenta", "optimizer": "yellow"}


class Watch(Callback):  # type: ignore[misc]
    """Progress, loss, validation loss, tokens/s and the share of each phase."""

    def __init__(self, console: Console, *, tokens_per_step: int, bytes_per_token: float | None, live: bool) -> None:
        self.console = console
        self.tokens_per_step = tokens_per_step
        self.bytes_per_token = bytes_per_token
        self.validation: float | None = None
        self.loss = math.nan
        self.live: Live | None = None
        self.wanted = live and console.is_terminal
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.task = self.progress.add_task("train", total=trainer.max_steps, completed=trainer.global_step)
        if self.wanted:
            self.live = Live(self.progress, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, index: int
    ) -> None:
        if self.live is None:
            return
        self.progress.update(self.task, completed=trainer.global_step)
        if trainer.global_step % 5 == 0 or math.isnan(self.loss):  # reading it waits for the device
            self.loss = module.loss.item()
        shares = bar_of(shares_of(module.recent, module.waits_s))
        self.live.update(Group(self.progress, self.numbers(trainer.global_step, module.pace), shares))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validation = float(trainer.callback_metrics["validation_loss"])
        self.loss = module.loss.item()
        line = self.numbers(trainer.global_step, module.pace)
        (self.live.console if self.live else self.console).print(line)

    def close(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    on_train_end = on_exception = close

    def numbers(self, step: int, pace: Pace) -> Text:
        """tokens/s of all steps so far, without validation and checkpoints."""
        line = f"step {step:5d}  loss {self.loss:.3f}"
        if self.validation is not None:
            per_byte = self.bytes_per_token
            bits = None if per_byte is None else self.validation / math.log(2) / per_byte
            line += f"  val {told_loss(self.validation, bits)}"
        rate = pace.steps_per_s()
        return Text(line if rate is None else f"{line}  {rate * self.tokens_per_step:,.0f} tokens/s")


class Track(Callback):  # type: ignore[misc]
    """Tells the tracker how training goes, between steps. FLOPs are in the model convention."""

    def __init__(self, tracker: LiveTracker, config: TrainConfig, module: LitGPT, every: int = 10) -> None:
        self.tracker, self.every, self.hardware = tracker, every, config.hardware
        self.tokens_per_step = config.data.batch * config.data.length
        model, batch, length = module.model.config, config.data.batch, config.data.length
        forward = cost.forward_flops(model, batch=batch, length=length)
        self.flops_per_step = (forward + cost.backward_flops(model, batch=batch, length=length)).total

    def on_fit_start(self, trainer: Trainer, module: LitGPT) -> None:
        device = device_of(module.device)
        self.memory = None if why_unreadable(module.device.type) else device.memory
        known = device.peaks() if self.hardware == "here" else lookup(self.hardware)
        peak = known.peak_flops_per_s.get(module.model.precision) if known else None
        self.peak_flops_per_s = None if peak is None else peak * trainer.world_size

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, index: int
    ) -> None:
        step = trainer.global_step
        if step % self.every or not module.recent:
            return
        shares = {f"phase/{name}_share": share for name, share in shares_of(module.recent, module.waits_s).items()}
        whole_s = sum(lap["step"] for lap in module.recent) + sum(module.waits_s)
        rate = len(module.recent) * self.tokens_per_step / whole_s
        figures = {"loss": module.loss.item(), "gradient_norm": module.norm.item(), "tokens_per_s": rate}
        figures["flops_per_s"] = rate * self.flops_per_step / self.tokens_per_step
        if self.memory is not None:
            figures["memory_bytes"] = self.memory.now()
        if self.peak_flops_per_s is not None:
            figures["mfu"] = figures["flops_per_s"] / self.peak_flops_per_s
        self.tracker.live(step, figures | shares)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.tracker.live(trainer.global_step, {"validation_loss": float(trainer.callback_metrics["validation_loss"])})


class Trace(Callback):  # type: ignore[misc]
    """What ran when in the first steps that are warm, for chrome://tracing or Perfetto.

    Lightning's own PyTorchProfiler starts over at every validation, and a short run then leaves no trace.
    """

    WARM, STEPS = 2, 3

    def __init__(self, path: Path) -> None:
        self.path = path
        self.profile: torch.profiler.profile | None = None
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if self.steps == min(self.WARM, trainer.max_steps - 1):
            self.profile = torch.profiler.profile()
            self.profile.start()
        self.steps += 1

    def on_train_batch_end(self, *_: object) -> None:
        if self.steps == self.WARM + self.STEPS:
            self.finish()

    def finish(self, *_: object) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.path))
            self.profile = None

    on_train_end = finish


def shares_of(laps: Iterable[Mapping[str, float]], waits_s: Iterable[float]) -> dict[str, float]:
    """Of the time of the recent steps and of their waits for data, by phase; none before a step was timed."""
    times: Counter[str] = Counter({"data": sum(waits_s)})
    for lap in laps:
        times.update(lap)
    stepped = times.pop("step", 0.0)
    whole = stepped + times["data"]
    return {phase: times[phase] / whole for phase in ("data", *PHASES) if stepped and phase in times}


def bar_of(shares: Mapping[str, float]) -> Text:
    """As words, and 40 characters long."""
    text, bar = Text(), Text()
    for phase, share in shares.items():
        text.append(f"{phase} {share:.0%}  ", style=COLOURS.get(phase, ""))
        bar.append("█" * round(40 * share), style=COLOURS.get(phase, ""))
    return Text.assemble(text, "\n", bar)
