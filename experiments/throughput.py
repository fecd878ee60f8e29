"""How many tokens a second does training through the Lightning module reach, against the usual fp32 PyTorch loop?

    python experiments/throughput.py
    python experiments/throughput.py compile=true precision=bf16

Both train the same baby GPT, a step of each in turn: the plain loop steps between two of Lightning's batches. It has a
process of its own, because the memory allocator's state is part of what is compared.

:chapter: Training
"""

import dataclasses
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, TrainerConfig
from isoforward.base.environment import environment, reference_kernel
from isoforward.base.estimates import ratio
from isoforward.base.malloc import keep_freed_pages
from isoforward.base.results import Results, Row, write
from isoforward.base.stopwatch import clock_for
from isoforward.measure.case import Case, batch_of, master_of, row, spent, timed
from isoforward.measure.trust import Watch, judge_trust
from isoforward.model import steps
from isoforward.show.compare import only, select
from isoforward.train.lightning_module import LitGPT, quieten

KINDS = {"matrix products": "::mm", "attention": "attention", "GELU": "gelu", "norms": "norm"}  # by operator's name


def plain_loop(case: Case, line: Connection) -> None:
    """The usual one: fp32 throughout, `loss.backward()`, `clip_grad_norm_`, torch's default AdamW.

    A step for each word that comes, whose seconds go back.
    """
    torch.set_num_threads(case.threads)
    model = master_of(dataclasses.replace(case, precision="fp32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    tokens, targets = batch_of(case)

    def step() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    while line.recv():
        line.send(spent(case, step))


class InTurn(Callback):
    def __init__(self, case: Case, line: Connection) -> None:
        self.line, self.clock = line, clock_for(torch.device(case.device))
        self.plain_s: list[float] = []
        self.lightning_s: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.line.send(True)
        self.plain_s.append(self.line.recv())
        self.start = self.clock.mark()

    def on_train_batch_end(self, *_: Any) -> None:
        end = self.clock.mark()
        self.clock.settle()
        self.lightning_s.append(self.clock.seconds(self.start, end))


def measure(packed: dict) -> None:
    case = Case.unpack(packed["case"])
    where = environment(packed["command"], torch.device(case.device))
    batch = batch_of(case)
    rounds = case.measure.warmup + case.measure.repeats
    module = LitGPT(master_of(case), case.optim, TrainerConfig(max_steps=rounds))
    if case.compile:
        module.model.compile_blocks()
    keep_freed_pages()
    line, its_end = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=plain_loop, args=(case, its_end), daemon=True)
    turns = InTurn(case, line)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    quieten()
    trainer = Trainer(
        accelerator="cpu" if case.device == "cpu" else "gpu", max_steps=rounds, callbacks=[turns], **quiet
    )
    with Watch(reference_kernel(case.device)) as watch:
        other.start()
        its_end.close()  # its end is the end of the line
        trainer.fit(module, DataLoader([batch] * rounds, batch_size=None))
        line.send(False)
        other.join()

    def tell() -> Iterator[Row]:
        for name, samples in (("plain fp32 loop", turns.plain_s), ("Lightning module", turns.lightning_s)):
            at = {"life": "training", "phase": "step", "per": "step", "conditions": case.training(through=name)}
            yield row(case, **at, **timed(samples[case.measure.warmup :]), environment=where.id)

    rows = list(tell())
    if case.device == "cpu":
        with torch.profiler.profile() as profile:
            steps.train_step(module.model, trainer.optimizers[0], *batch, clip=case.optim.clip)
        rows += [dataclasses.replace(each, environment=where.id) for each in operators(case, profile)]
    write(Path(packed["results"]), [where, *rows, judge_trust(case.experiment, rows, watch, environment=where.id)])


def operators(case: Case, profile: torch.profiler.profile) -> Iterator[Row]:
    """What one more step is made of."""
    spent_s: Counter[str] = Counter()
    for event in profile.key_averages():
        kind = next((kind for kind, part in KINDS.items() if part in event.key), "everything else")
        spent_s[kind] += event.self_cpu_time_total / 1e6
    about = {"life": "training", "phase": "step", "quantity": "operators", "unit": "s", "per": "step"}
    for kind, time_s in spent_s.most_common():
        yield row(case, **about, value=time_s, conditions=case.training(operators=kind))


def answer(results: Results) -> str:
    plain, ours = (only(results, through=name) for name in ("plain fp32 loop", "Lightning module"))
    found = ratio(plain.samples, ours.samples)
    parts = select(results, quantity="operators")
    whole_s = sum(part.value for part in parts)
    made_of = ", ".join(f"{part.conditions['operators']} {part.value / whole_s:.0%}" for part in parts)
    rates = [units.count(r.conditions["tokens"] / r.value) for r in (plain, ours)]
    return (
        f"The plain fp32 loop trains {rates[0]} tokens/s, the Lightning module {rates[1]}: "
        f"{units.times(found.value)} ({found.low:.2f} to {found.high:.2f})."
        + (f" Its time by operator: {made_of}." if parts else "")
    )


def main(config: ExperimentConfig) -> None:
    ask(config, "throughput", "throughput:measure", answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
