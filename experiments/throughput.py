"""How many tokens a second does training through the Lightning module reach, against the usual fp32 PyTorch loop?

    python experiments/throughput.py
    python experiments/throughput.py compile=true precision=bf16

Both train the same baby GPT, a step of each in turn: the plain loop steps between two of Lightning's batches. It has a
process of its own, because the memory allocator's state is part of what is compared.

:chapter: Training
:unread: measure.context measure.energy measure.new_tokens measure.prompt
"""

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, TrainerConfig
from isoforward.base.malloc import keep_freed_pages
from isoforward.base.results import Results, Row, RowFields, only, select
from isoforward.measure.benchmark import Measured, Part, timed
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.passes import Bench
from isoforward.measure.remote import remote
from isoforward.model import steps
from isoforward.model.optim import build
from isoforward.train.lightning_module import LitGPT, quieten

KINDS = {"matrix products": "::mm", "attention": "attention", "GELU": "gelu", "norms": "norm"}  # by operator's name


def plain_loop(line: Connection, case: Case) -> None:
    """The usual one: fp32 throughout, `loss.backward()`, `clip_grad_norm_`, torch's default AdamW."""
    torch.set_num_threads(case.threads or 1)
    model = master_of(dataclasses.replace(case, precision="fp32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    tokens, targets = batch_of(case)

    def step() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    work = timed(case.clock, through("plain fp32 loop", case), step)
    while True:
        line.send(work.run(line.recv()))


class OnCommand(Callback):  # type: ignore[misc]
    """Holds training before a batch until it is told how many to take, and then sends the seconds of one."""

    def __init__(self, case: Case, line: Connection) -> None:
        self.line, self.clock = line, case.clock
        self.left = 0

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.left:
            self.count = self.left = self.line.recv()
            self.start = self.clock.mark()

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            end = self.clock.mark()
            self.clock.settle()
            self.line.send([self.clock.seconds(self.start, end) / self.count])


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch)


def lightning_loop(line: Connection, case: Case) -> None:
    torch.set_num_threads(case.threads or 1)
    module = LitGPT(master_of(case), case.optim, TrainerConfig(max_steps=10**9))
    if case.compile:
        module.model.compile_blocks()
    keep_freed_pages()
    quieten()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accelerator = "cpu" if case.device == "cpu" else "gpu"
    trainer = Trainer(accelerator=accelerator, max_steps=10**9, callbacks=[OnCommand(case, line)], **quiet)
    trainer.fit(module, DataLoader(Endless(batch_of(case)), batch_size=None))


def through(name: str, case: Case) -> Part:
    return case.step("step", through=name)


def bench(case: Case) -> Bench:
    plain = remote((through("plain fp32 loop", case),), plain_loop, case)
    ours = remote((through("Lightning module", case),), lightning_loop, case)

    def rows(measured: Measured) -> Iterator[Row]:
        if case.device == "cpu":
            yield from operators(case)

    return Bench(works=[plain, ours], pairs=[(plain.part, ours.part)], rows=rows)


def operators(case: Case) -> Iterator[Row]:
    """What a step is made of."""
    model = master_of(case)
    optimizer, batch = build(model, case.optim), batch_of(case)
    steps.train_step(model, optimizer, *batch, clip=case.optim.clip)
    with torch.profiler.profile() as profile:
        steps.train_step(model, optimizer, *batch, clip=case.optim.clip)
    spent_s: Counter[str] = Counter()
    for event in profile.key_averages():
        kind = next((kind for kind, part in KINDS.items() if part in event.key), "everything else")
        spent_s[kind] += event.self_cpu_time_total / 1e6
    about: RowFields = {"life": "training", "phase": "step", "quantity": "operators", "per": "step"}
    for kind, time_s in spent_s.most_common():
        yield case.row(about, value=time_s, conditions=case.training(operators=kind))


def answer(results: Results) -> str:
    plain, ours = (only(results, through=name, quantity="time") for name in ("plain fp32 loop", "Lightning module"))
    found = results.judge(plain, ours)
    parts = select(results, quantity="operators")
    whole_s = sum(part.number for part in parts)
    made_of = ", ".join(f"{part.conditions['operators']} {part.number / whole_s:.0%}" for part in parts)
    rates = [units.count(r.setting("tokens") / r.number) for r in (plain, ours)]
    return (
        f"The plain fp32 loop trains {rates[0]} tokens/s, the Lightning module {rates[1]}: "
        f"in time {found.sentence()}." + (f" Its time by operator: {made_of}." if parts else "")
    )


def main(config: ExperimentConfig) -> None:
    ask(config, "throughput", bench, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
