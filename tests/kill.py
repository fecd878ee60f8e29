"""Trains, is killed, resumes, and compares: `python -m tests.kill --kills 50`.

Every run is a fork, so that torch is imported once. SIGKILL comes at a random time, or at the n-th of all events of a
run: the middle and the end of a write, before and after an fsync or a rename. What trains is small, with dropout,
accumulation and validation, and saves at every step.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from isoforward.base.config import DataConfig, MeasureConfig, ModelConfig, TrackingConfig, TrainConfig, TrainerConfig
from isoforward.base.storage import DONE
from isoforward.formats import checkpoint_file

TEXT = "To be, or not to be: that is the question.\n" * 60


def tiny_run(where: Path, name: str = "run", *, dropout: float = 0.2, **trainer: Any) -> TrainConfig:
    text = where / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    plan = {"max_steps": 4, "checkpoint_every": 1, "validate_every": 2, "validation_batches": 1, "accumulate": 2}
    return TrainConfig(
        model=ModelConfig(layers=1, heads=2, width=16, context=16, dropout=dropout),
        data=DataConfig(
            source="text", path=str(text), tokenizer="char", batch=4, length=8, cache_dir=str(where / "cache")
        ),
        trainer=TrainerConfig(**{**plan, **trainer}),
        measure=MeasureConfig(enabled=False),
        tracking=TrackingConfig(mode="none"),
        sample_prompt="To",
        precision="fp32",
        run_dir=str(where / "runs" / name),
    )


def in_a_fork(work: Callable[[], object], *, kill_after_s: float | None = None) -> int:
    """The exit code of `work`, as subprocess has it: -9 where it was killed."""
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # should it hang
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        error = os.dup(2)
        os.dup2(quiet, 2)
        try:
            work()
            os._exit(0)
        except BaseException as told:
            os.write(error, f"{type(told).__name__}: {told}\n".encode())
            os._exit(getattr(told, "exit_code", 1))
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_event(number: int, work: Callable[[], object]) -> Callable[[], object]:
    """`work`, killed at its `number`-th event; only for a process that ends with it."""

    def dying() -> None:
        events = count()

        def event() -> None:
            if next(events) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def around(name: str) -> None:
            real = getattr(os, name)
            setattr(os, name, lambda *given: (event(), real(*given), event()))

        class Dying(io.FileIO):
            def write(self, content: Any) -> int:
                half = len(content) // 2
                super().write(content[:half])
                event()
                super().write(content[half:])
                event()
                return len(content)

        opened = Path.open

        def opening(path: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
            if mode != "xb+":  # what storage.write_atomically writes to
                return opened(path, mode, *given, **more)
            return io.BufferedRandom(Dying(path, "x+"))

        for name in ("fsync", "replace", "rename"):
            around(name)
        Path.open = opening  # type: ignore[assignment, method-assign]
        work()

    return dying


def attempt(where: Path, number: int) -> Callable[[], object]:
    from isoforward.app.train import train

    return lambda: train(tiny_run(where, str(number), resume="auto"))


def finished(where: Path) -> dict[str, Any]:
    """Weights and optimizer that the run under `where` ended with."""
    run = min(where.glob(f"runs/[0-9]*/{DONE}")).parent
    newest = checkpoint_file.newest_good(run / "checkpoints")
    assert newest is not None
    state = checkpoint_file.load(newest)
    assert state["global_step"] == 4
    return {key: state[key] for key in ("state_dict", "optimizer_states")}


def trial(where: Path, deaths: Iterator[Callable[[Callable[[], object]], int]]) -> tuple[int, dict[str, Any]]:
    """One run, which dies as often as `deaths` says and then goes on to its end: how often, and what it ended with."""
    where.mkdir(parents=True, exist_ok=True)
    died = tries = 0
    for death in deaths:
        code = death(attempt(where, tries))
        assert code in (0, -signal.SIGKILL), f"{where.name}: ended with code {code}"
        died, tries = died + (code != 0), tries + 1
        with warnings.catch_warnings(action="error"):  # nothing half-written bears the name of a checkpoint
            for run in where.glob("runs/*/checkpoints"):
                checkpoint_file.newest_good(run)
        if code == 0:
            return died, finished(where)
    code = in_a_fork(attempt(where, tries))
    assert code == 0, f"{where.name}: going on ended with code {code}"
    return died, finished(where)


def same(left: Any, right: Any) -> bool:
    """Tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed at a random time")
    parser.add_argument("--stride", type=int, default=1, help="killed at every so many-th event")
    parser.add_argument("--times", type=int, default=3, help="how often the runs of the last part are killed")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        _, whole = trial(where / "whole", iter(()))
        started = time.monotonic()
        trial(where / "timed", iter(()))
        length_s = time.monotonic() - started
        kills = 0

        def check(name: str, *deaths: Callable[[Callable[[], object]], int]) -> int:
            nonlocal kills
            died, ended = trial(where / name, iter(deaths))
            assert same(ended, whole), f"{name}: the weights are not those of the uninterrupted run"
            kills += died
            return died

        def killed_at(number: int, work: Callable[[], object]) -> int:
            return in_a_fork(at_event(number, work))

        def sometime(work: Callable[[], object]) -> int:
            return in_a_fork(work, kill_after_s=draw.uniform(0, length_s))

        events = next(
            number for number in count(step=asked.stride) if not check(f"event {number}", partial(killed_at, number))
        )
        print(f"killed at every {asked.stride}. of {events} writes, fsyncs and renames: the same weights")
        for number in range(asked.kills):
            check(f"time {number}", sometime)
        print(f"killed at {asked.kills} random times: the same weights")
        for number in range(-(-asked.kills // 5)):
            check(f"times {number}", *[sometime] * asked.times)
        print(f"killed {asked.times} times over: the same weights; {kills} kills in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
