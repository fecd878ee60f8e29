"""How training ends before its end, and how it goes on from there to the weights that it would have had."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console

from isoforward.base.config import TrainConfig
from isoforward.base.dependent_keys import flat, unread, within
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import DONE, TEXT_LIMIT, TIME_IS_UP
from isoforward.base.terminal import say
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.checkpoint_file import load, newest_good, verify
from isoforward.formats.untrusted import shown

MAY_DIFFER = ("run_dir", "tracking", "trainer.resume", "trainer.progress", "trainer.max_time", "trainer.profiler")


class StopOnSignal(Callback):  # type: ignore[misc]
    """SIGINT and SIGTERM end training after the step under way. Until its checkpoint is written no other changes that;
    from then on one ends the program at once, whatever it waits for.
    """

    def __init__(self, validate_every: int) -> None:
        self.validate_every = validate_every
        self.received: int | None = None
        self.over = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While training runs, and after it where it was stopped."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.listen()
        try:
            yield
        finally:
            self.over = True
            self.listen()
            if self.received is None:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def listen(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    on_train_start = listen  # again: Lightning has put its own handler of SIGTERM there

    def note(self, number: int, frame: object) -> None:
        if self.over:
            os._exit(128 + number)
        if self.received is None:
            self.received = number
            os.write(2, b"\nstopping after this step\n")

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            trainer.should_stop = True
            if trainer.global_step % self.validate_every:  # Lightning would validate wherever it stops
                trainer.limit_val_batches = 0


class StopOnTime(Callback):  # type: ignore[misc]
    """Ends training after the step under way once its time is up. Each start of a run has all of it, which Lightning's
    own limit, kept in checkpoints, would not give.
    """

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self.now = limit_s, now
        self.up = False

    def on_train_start(self, *_: object) -> None:
        self.started = self.now()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.up = trainer.strategy.reduce_boolean_decision(self.now() - self.started >= self.limit_s, all=False)
        trainer.should_stop = trainer.should_stop or self.up


class ValidateLast(Callback):  # type: ignore[misc]
    """The weights that are left are judged: Lightning validates where it is stopped, and not at a last step that comes
    between two validations.
    """

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= trainer.max_steps


class KeepBest(Checkpoint):  # type: ignore[misc]
    """Training's state at the lowest validation loss."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lowest = math.inf

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if (loss := float(trainer.callback_metrics["validation_loss"])) < self.lowest:
            self.lowest = loss
            keep(trainer, self.directory, "best")

    def state_dict(self) -> dict[str, float]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.lowest = state["lowest"]


class KeepLast(Checkpoint):  # type: ignore[misc]
    """Training's state, every so many steps and wherever it ends.

    Where a step is validated, only after that: what goes on from there does not validate it again, and has to know
    what came of it. Lightning calls a Checkpoint after all other callbacks, these in their own order.
    """

    def __init__(self, directory: Path, every: int, validate_every: int) -> None:
        self.directory, self.every, self.validate_every = directory, every, validate_every
        self.saved = -1

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        validated = trainer.should_stop and trainer.limit_val_batches
        if trainer.global_step % self.validate_every and not validated:
            self.save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.save_if_due(trainer)

    def save_if_due(self, trainer: Trainer) -> None:
        if trainer.global_step % self.every == 0 or trainer.should_stop:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        self.saved = trainer.global_step
        keep(trainer, self.directory, "last")


def keep(trainer: Trainer, directory: Path, name: str) -> None:
    """The newest alone of its name; what it replaces goes after it is there."""
    newest = directory / f"{name}-{trainer.global_step:06d}.ckpt"
    with trainer.lightning_module.pace.paused():
        trainer.save_checkpoint(newest)
        for path in set(directory.glob(f"{name}-*.ckpt")) - {newest}:
            trainer.strategy.remove_checkpoint(path)


def to_resume(config: TrainConfig, console: Console) -> Path | None:
    """The checkpoint that `trainer.resume` means: a file, or the newest good one of a run that has not finished, or
    whose time was up.
    """
    wanted = config.trainer.resume
    if wanted is None:
        return None
    if wanted == "auto":
        beside = Path(os.path.normpath(Path(config.run_dir, ".."))).glob("*/checkpoints")
        runs = [path for path in beside if not path.parent.is_symlink()]
        runs.sort(key=lambda path: path.stat().st_mtime)
        unfinished = [path for path in runs if not (path.parent / DONE).exists() or (path.parent / TIME_IS_UP).exists()]
        for directory in reversed(unfinished):
            if (found := newest_good(directory)) is not None:
                say(console, f"going on from {found}")
                return found
        say(console, "nothing to resume: starting afresh")
        return None
    path = Path(wanted)
    if path.is_file():
        verify(path)
        return path
    if not path.is_dir():
        raise BadInput(f"trainer.resume={wanted} does not exist; write auto, a run directory or a checkpoint")
    found = newest_good(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise BadInput(f"trainer.resume={wanted} holds no good checkpoint")
    return found


def refuse_finished(checkpoint: Path, config: TrainConfig) -> None:
    """Nothing is left to train from the last state of a run that is done: its results would only be lost."""
    run, named = checkpoint.parent.parent, checkpoint.parent.glob("last-*.ckpt")
    if (run / TIME_IS_UP).exists() or not (run / DONE).exists():  # in this order: another rank removes DONE first
        return
    steps = load(checkpoint, only=("global_step",)).get("global_step", 0)
    if steps >= max((int(path.stem.removeprefix("last-")) for path in named), default=0):
        raise BadInput(
            f"{run} is finished ({steps:,} of {config.trainer.max_steps:,} steps), and is left as it is; "
            "to train for longer, begin a run with a larger trainer.max_steps"
        )


def refuse_another(config: TrainConfig) -> None:
    """A run goes on under the config that it began with, or its weights would be nobody's. Keys without effect may
    differ: earlier versions let them be typed.
    """
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        raise BadInput(f"{path} is missing: trainer.resume goes on with a run of python train.py")
    defaults = flat(dataclasses.asdict(TrainConfig()))  # of keys that came after the run began
    began = defaults | flat(read_yaml(path))
    now = flat(dataclasses.asdict(config))
    off = unread(now)
    keys = sorted(key for key in began.keys() | now.keys() if not key.startswith(MAY_DIFFER) and not within(key, off))
    if unlike := [
        f"{key}={now.get(key)} (began with {began.get(key)})" for key in keys if began.get(key) != now.get(key)
    ]:
        raise BadInput(
            f"{config.run_dir} is a run of another configuration: {', '.join(unlike)}; "
            "with no key but trainer.resume it goes on as it began"
        )


class Plain(yaml.SafeLoader):  # type: ignore[misc]
    def compose_node(self, parent: object, index: object) -> object:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for more than all memory
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            content = yaml.load(file.read(TEXT_LIMIT), Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Integrity(f"{path} is damaged: {shown(str(error).splitlines()[0])}") from error
    if not isinstance(content, dict):
        raise Integrity(f"{path} holds no configuration")
    return content


def refuse_other_tokens(checkpoint: Path, tokenizer: Tokenizer) -> None:
    kept = checkpoint.parent / "tokenizer.json"
    if Tokenizer.load(kept).sha256 != tokenizer.sha256:
        raise Integrity(f"{kept} is not the tokenizer of this data: data or data.tokenizer changed since the run began")
