"""What does a second process add to a training step, and what does its communication cost?

    python experiments/distributed.py
    python experiments/distributed.py model=small data.batch=4

Two processes of one thread each take half of every batch and average gradients over gloo, which is the step of one
process on the whole batch. Three ways are compared: gradients averaged after the backward, as a phase of its own;
averaged during the backward, as DistributedDataParallel does; and not averaged. The baseline is one process that takes
half a batch while the other core is idle.

:chapter: Training
:unread: measure.context measure.energy measure.new_tokens measure.prompt optim.clip optim.min_lr optim.schedule
optim.warmup_steps
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, only
from isoforward.base.vocabulary import Condition
from isoforward.measure.benchmark import Measured, Work, phased
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.passes import Bench
from isoforward.measure.remote import start
from isoforward.model.cost import parameters
from isoforward.model.gpt import GPT
from isoforward.model.optim import build
from isoforward.model.steps import train_step
from isoforward.plan.economics import collective_bytes
from isoforward.plan.forecast import averaging_rows
from isoforward.train.distributed import free_port, ranks

WORLD = 2
WAYS = ("after the backward", "within the backward", "never", "one process")
PHASES = ("forward", "loss", "backward", "communication", "optimizer", "step")


class Ways:
    """The same in every process: what one awaits the other must send."""

    def __init__(self, case: Case) -> None:
        model, shared = master_of(case), DistributedDataParallel(master_of(case))
        optimizer, its_optimizer = build(model, case.optim), build(shared.module, case.optim)
        tokens, targets = (part[dist.get_rank() :: WORLD] for part in batch_of(case))
        mine = replace(case, batch=case.batch // WORLD)

        def work(way: str) -> Work:
            within = way == "within the backward"
            step = partial(
                train_step,
                shared if within else model,
                its_optimizer if within else optimizer,
                tokens,
                targets,
                clip=1.0,
                synchronise=average if way == "after the backward" else None,
            )
            alone = way == "one process"
            conditions: dict[str, Condition] = {
                "averaged": "never" if alone else way,
                "processes": 1 if alone else WORLD,
            }
            phases = [phase for phase in PHASES if phase != "communication" or way == "after the backward"]
            parts = {phase: mine.step(phase, **conditions) for phase in phases}
            whole = phased(case.clock, parts, lambda phase: step(phase=phase))

            def run(n: int) -> Sequence[float]:
                dist.barrier()
                return whole.run(n)

            return Work(parts=whole.parts, run=whole.run if alone else run)

        self.works = {way: work(way) for way in WAYS}


def average(model: nn.Module) -> None:
    """All gradients as one message, as DistributedDataParallel sends a bucket."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= WORLD
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def difference(case: Case, steps: int = 3) -> float:
    """The largest difference, in nats, between the losses of the processes together and of one on the whole batch."""

    def losses(model: GPT, tokens: Tensor, targets: Tensor, **how: Any) -> list[Tensor]:
        optimizer = build(model, case.optim)
        return [train_step(model, optimizer, tokens, targets, **how)[0] for _ in range(steps)]

    model, (tokens, targets) = master_of(case), batch_of(case)
    parts = (part[dist.get_rank() :: WORLD] for part in (tokens, targets))
    mine = torch.stack(losses(model, *parts, synchronise=average))
    dist.all_reduce(mine)
    alone = torch.stack(losses(master_of(case), tokens, targets))
    return float((mine / WORLD - alone).abs().max())


def join(case: Case, rank: int, group: dict[str, str]) -> tuple[float, Ways]:
    torch.set_num_threads(1)
    os.environ.update(group | ranks(rank))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    return difference(case), Ways(case)


def follow(line: Connection, case: Case, group: dict[str, str]) -> None:
    """The other process: it runs what it is told, as the first one does."""
    _, ways = join(case, 1, group)
    while True:
        way, n = line.recv()
        ways.works[way].run(n)


def bench(case: Case) -> Bench:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = start(follow, case, group)
    differing, ways = join(case, 0, group)

    def both(way: str, work: Work) -> Work:
        def run(n: int) -> Sequence[float]:
            if way != "one process":
                line.send((way, n))
            return work.run(n)

        return Work(parts=work.parts, run=run)

    works = {way: both(way, work) for way, work in ways.works.items()}
    steps = {way: {part.phase: part for part in work.parts} for way, work in works.items()}
    after, within, never, alone = (steps[way] for way in WAYS)
    pairs = [(after["step"], alone["step"]), (within["backward"], never["backward"])]

    def rows(measured: Measured) -> Iterator[Row]:
        mine = replace(case, batch=case.batch // WORLD)
        about: RowFields = {"life": "training", "conditions": mine.training(processes=WORLD)}
        size = 4 * parameters(case.model).total
        sent = collective_bytes("all_reduce", size, ways=WORLD)
        how: RowFields = {"phase": "communication", "per": "step", "quantity": "bytes", "provenance": "predicted"}
        yield case.row(about, how, value=sent)
        yield from averaging_rows(mine, size, ways=WORLD)
        yield case.row(about, phase="loss", per="token", quantity="difference", value=differing)

    return Bench(works=list(works.values()), pairs=pairs, rows=rows)


def answer(results: Results) -> str:
    def time(phase: str, averaged: str, processes: int = WORLD) -> Row:
        return only(results, quantity="time", phase=phase, averaged=averaged, processes=processes)

    step, alone = time("step", WAYS[0]), time("step", "never", 1)
    communication = time("communication", WAYS[0])
    sent = only(results, quantity="bytes").number
    share = communication.number / step.number
    scaled = results.judge(alone, step).ratio
    synchronised = results.judge(*(time("backward", way) for way in (WAYS[1], "never"))).ratio
    return (
        f"Two processes train {units.times(2 * scaled.value)} the tokens a second of one ({2 * scaled.low:.2f} to "
        f"{2 * scaled.high:.2f}), with losses that differ by at most {only(results, quantity='difference').number:.1g} "
        f"nats. Averaging gradients takes {units.seconds(communication.number)}, {share:.0%} "
        f"of their step: a ring sends {units.size(sent)} from each, so {units.count(sent / communication.number)}B/s. "
        f"A backward that averages within it takes {units.times(synchronised.value)} one that does not "
        f"({synchronised.low:.2f} to {synchronised.high:.2f})."
    )


def main(config: ExperimentConfig) -> None:
    if config.data.batch % WORLD:
        raise BadInput(f"data.batch={config.data.batch} cannot be shared by {WORLD} processes; write an even one")
    ask(config, "distributed", bench, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
