"""What does a second process add to a training step, and what does its communication cost?

    python experiments/distributed.py
    python experiments/distributed.py model=small data.batch=4

Two processes of one thread each take half of every batch and average gradients over gloo, which is the step of one
process on the whole batch. Three ways are compared: gradients averaged after the backward, as a phase of its own;
averaged during the backward, as DistributedDataParallel does; and not averaged. The baseline is one process that takes
half a batch while the other core is idle.

:chapter: Training
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.environment import environment, reference_kernel
from isoforward.base.errors import BadInput
from isoforward.base.estimates import interleaved, ratio
from isoforward.base.results import Results, Row, write
from isoforward.base.stopwatch import Stopwatch, clock_for
from isoforward.measure.case import Case, batch_of, master_of, row, timed
from isoforward.measure.trust import Watch, judge_trust
from isoforward.model.cost import parameters
from isoforward.model.gpt import GPT
from isoforward.model.loss import next_token_loss
from isoforward.model.optim import build
from isoforward.model.steps import train_step
from isoforward.plan.economics import collective_bytes
from isoforward.plan.forecast import averaging_rows
from isoforward.show.compare import only
from isoforward.train.distributed import free_port, ranks, start

WORLD = 2
WAYS = ("after the backward", "within the backward", "never", "one process")
PHASES = ("forward", "loss", "backward", "communication", "optimizer", "step")


def average(model: GPT) -> None:
    """All gradients as one message, as DistributedDataParallel sends a bucket."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= WORLD
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def candidates(case: Case) -> dict[str, Callable[[], dict[str, float]]]:
    """The same in every process, in the same order: what one awaits the other must send."""
    model = master_of(case)
    optimizer = build(model, case.optim)
    shared = DistributedDataParallel(master_of(case))
    its_optimizer = build(shared.module, case.optim)
    tokens, targets = (part[dist.get_rank() :: WORLD] for part in batch_of(case))
    stopwatch = Stopwatch(clock_for(torch.device("cpu")))

    def step(phase: Stopwatch, forward: nn.Module, optimizer: Any, averaged: bool) -> None:
        with phase("forward"):
            logits = forward(tokens)
        with phase("loss"):
            loss = next_token_loss(logits, targets)
        with phase("backward"):
            loss.backward()
        if averaged:
            with phase("communication"):
                average(model)
        with phase("optimizer"):
            nn.utils.clip_grad_norm_(forward.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def timed_step(way: str) -> dict[str, float]:
        dist.barrier()
        if way == "one process" and dist.get_rank() > 0:
            return {}
        if way == "within the backward":
            return stopwatch.lap(lambda phase: step(phase, shared, its_optimizer, averaged=False))
        return stopwatch.lap(lambda phase: step(phase, model, optimizer, averaged=way == "after the backward"))

    return {way: lambda way=way: timed_step(way) for way in WAYS}


def difference(case: Case, steps: int = 3) -> float:
    """The largest difference, in nats, between the losses of the processes together and of one on the whole batch."""

    def losses(model: GPT, tokens: Tensor, targets: Tensor, backward: Callable[[Tensor], None]) -> list[Tensor]:
        optimizer = build(model, case.optim)
        return [train_step(model, optimizer, tokens, targets, backward=backward)[0] for _ in range(steps)]

    model, (tokens, targets) = master_of(case), batch_of(case)

    def backward(loss: Tensor) -> None:
        loss.backward()
        average(model)

    mine = torch.stack(losses(model, *(part[dist.get_rank() :: WORLD] for part in (tokens, targets)), backward))
    dist.all_reduce(mine)
    alone = torch.stack(losses(master_of(case), tokens, targets, Tensor.backward))
    return float((mine / WORLD - alone).abs().max())


def member(packed: dict) -> tuple[float, dict[str, list[dict[str, float]]]]:
    """What every process runs."""
    torch.set_num_threads(1)
    case = Case.unpack(packed["case"])
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=WORLD)
    try:
        differing, ways = difference(case), candidates(case)
        interleaved(ways, case.measure.warmup, seed=case.seed)
        return differing, interleaved(ways, case.measure.repeats, seed=case.seed + 1)
    finally:
        dist.destroy_process_group()


def measure(packed: dict) -> None:
    case = Case.unpack(packed["case"])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.set_num_threads(1)
    where = environment(packed["command"], torch.device("cpu"))
    with Watch(reference_kernel("cpu")) as watch:
        other = start({"target": "distributed:member", "payload": packed}, group | ranks(1), 1)
        os.environ.update(group | ranks(0))
        try:
            differing, laps = member(packed)
        finally:
            other.kill()
            other.wait()
    rows = [dataclasses.replace(each, environment=where.id) for each in told(case, differing, laps)]
    write(Path(packed["results"]), [where, *rows, judge_trust(case.experiment, rows, watch, environment=where.id)])


def told(case: Case, differing: float, laps: dict[str, list[dict[str, float]]]) -> Iterator[Row]:
    mine = dataclasses.replace(case, batch=case.batch // WORLD)
    for way in WAYS:
        processes = 1 if way == "one process" else WORLD
        at = mine.training(averaged="never" if processes == 1 else way, processes=processes)
        for phase in PHASES:
            if phase in laps[way][0]:
                samples = timed([lap[phase] for lap in laps[way]])
                yield row(case, life="training", phase=phase, per="step", **samples, conditions=at)
    about = {"life": "training", "phase": "communication", "per": "step", "provenance": "predicted"}
    sent = collective_bytes("all_reduce", 4 * parameters(case.model).total, ways=WORLD)
    yield row(case, **about, quantity="bytes", unit="byte", value=sent, conditions=mine.training(processes=WORLD))
    yield from averaging_rows(mine, 4 * parameters(case.model).total, ways=WORLD)
    about = {"life": "training", "phase": "loss", "quantity": "difference", "unit": "nats", "per": "token"}
    yield row(case, **about, value=differing, conditions=mine.training(processes=WORLD))


def answer(results: Results) -> str:
    def time(phase: str, averaged: str, processes: int = WORLD) -> Row:
        return only(results, quantity="time", phase=phase, averaged=averaged, processes=processes)

    step, alone = time("step", WAYS[0]), time("step", "never", 1)
    communication = time("communication", WAYS[0])
    sent = only(results, quantity="bytes").value
    scaled = ratio(alone.samples, step.samples)
    synchronised = ratio(*(time("backward", way).samples for way in (WAYS[1], "never")))
    return (
        f"Two processes train {units.times(2 * scaled.value)} the tokens a second of one ({2 * scaled.low:.2f} to "
        f"{2 * scaled.high:.2f}), with losses that differ by at most {only(results, quantity='difference').value:.1g} "
        f"nats. Averaging gradients takes {units.seconds(communication.value)}, {communication.value / step.value:.0%} "
        f"of their step: a ring sends {units.size(sent)} from each, so {units.count(sent / communication.value)}B/s. "
        f"A backward that averages within it takes {units.times(synchronised.value)} one that does not "
        f"({synchronised.low:.2f} to {synchronised.high:.2f})."
    )


def main(config: ExperimentConfig) -> None:
    if config.data.batch % WORLD:
        raise BadInput(f"data.batch={config.data.batch} cannot be shared by {WORLD} processes; write an even one")
    ask(config, "distributed", "distributed:measure", answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
