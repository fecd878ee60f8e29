"""What does a checkpoint that notices its own damage cost, against writing the same bytes to the same disk?

    python experiments/saving.py
    python experiments/saving.py model=gpt2 measure.budget=20

Weights and optimizer state. Every write ends on the disk (fsync); reads find the file in the system's cache.

:chapter: Trust
:unread: measure.context measure.energy measure.new_tokens measure.prompt optim.clip optim.min_lr optim.schedule
optim.warmup_steps
"""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.results import Results, Row, only
from isoforward.formats import checkpoint_file
from isoforward.measure.benchmark import Measured, Part, Work, timed
from isoforward.measure.case import Case, master_of
from isoforward.measure.passes import Bench
from isoforward.model.optim import build

WAYS = ("plain write", "torch.save", "save", "verify", "load")


def state_of(case: Case) -> dict[str, object]:
    """As after a training step."""
    model = master_of(case)
    optimizer = build(model, case.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"global_step": 1, "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def write_plainly(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def save_with_torch(path: Path, state: dict[str, object]) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def bench(case: Case) -> Bench:
    directory = tempfile.TemporaryDirectory(dir=".")  # on the disk that runs are written to
    kept, written = Path(directory.name) / "kept.ckpt", Path(directory.name) / "written.ckpt"
    state = state_of(case)
    checkpoint_file.save(kept, state)
    content = kept.read_bytes()
    ways: dict[str, Callable[[], object]] = {
        "plain write": partial(write_plainly, written, content),
        "torch.save": partial(save_with_torch, written, state),
        "save": partial(checkpoint_file.save, written, state),
        "verify": partial(checkpoint_file.verify, kept),
        "load": partial(checkpoint_file.load, kept),
    }

    def remove(n: int) -> None:
        written.unlink(missing_ok=True)  # none overwrites what another wrote

    def work(way: str) -> Work:
        conditions = case.conditions(optimizer=case.optim.name, checkpoint_bytes=len(content), way=way)
        part = Part(life="training", phase="run", per="run", conditions=conditions)
        return timed(case.clock, part, ways[way], prepare=remove)

    def rows(measured: Measured) -> list[Row]:
        directory.cleanup()
        return []

    works = [work(way) for way in WAYS]
    pairs = [(works[0].part, each.part) for each in works[1:]]
    return Bench(works=works, pairs=pairs, rows=rows)


def answer(results: Results) -> str:
    times = {way: only(results, quantity="time", way=way) for way in WAYS}
    size = times["save"].setting("checkpoint_bytes")
    plain = times["plain write"]
    speed = {way: results.judge(plain, times[way]).sentence() for way in WAYS[1:]}
    return (
        f"Of the speed of a plain write, {units.size(size / plain.number)}/s for {units.size(size)}: "
        f"save {speed['save']}, verify {speed['verify']}, load {speed['load']}; torch.save, which notices nothing, "
        f"{speed['torch.save']}."
    )


def main(config: ExperimentConfig) -> None:
    ask(config, "saving", bench, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
