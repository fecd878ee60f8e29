"""What does each rung between inference and a training step add, in time, memory and FLOPs?

    python experiments/cost_ladder.py
    python experiments/cost_ladder.py checkpoint=runs/latest data.batch=8

The same weights run the same batch, first under inference_mode, then with one more part of training at each rung, up to
the whole optimizer step.

:chapter: Training against inference
:unread: measure.context measure.energy measure.new_tokens measure.prompt optim.min_lr optim.schedule
optim.warmup_steps
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from isoforward.app.command_line import run
from isoforward.app.question import asking, at_most, case_of
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.memory_readers import ProcessMemory
from isoforward.base.results import Results, Row, RowFields, only, unavailable
from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.measure import flops
from isoforward.measure.benchmark import Measured, Part, timed
from isoforward.measure.case import Case, batch_of, counted, master_of
from isoforward.measure.memory import HONEST_MALLOC, PeakOf, tiny_like
from isoforward.measure.passes import Bench, against_first
from isoforward.model import steps
from isoforward.model.gpt import GPT
from isoforward.model.loss import next_token_loss
from isoforward.model.optim import build

RUNGS = ("inference_mode", "no_grad", "grad, eval", "training mode", "+ loss", "+ backward", "+ optimizer")
REACHES = {"+ loss": ("loss",), "+ backward": ("loss", "backward"), "+ optimizer": ("loss", "backward", "optimizer")}


def rungs(case: Case, model: GPT, tokens: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    optimizer = build(model, case.optim)

    def forward(*, training: bool) -> Tensor:
        return model.train(training)(tokens)  # type: ignore[no-any-return]

    def loss() -> Tensor:
        return next_token_loss(forward(training=True), targets)

    def backward() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad(set_to_none=True)

    return {
        "inference_mode": torch.inference_mode()(lambda: forward(training=False)),
        "no_grad": torch.no_grad()(lambda: forward(training=False)),
        "grad, eval": lambda: forward(training=False),
        "training mode": lambda: forward(training=True),
        "+ loss": loss,
        "+ backward": backward,
        "+ optimizer": lambda: steps.train_step(model.train(), optimizer, tokens, targets, clip=case.optim.clip),
    }


def bench(case: Case) -> Bench:
    """Every rung against the first."""
    climbed = rungs(case, master_of(case), *batch_of(case))

    def rows(measured: Measured) -> Iterator[Row]:
        of = flops.count_training(case.model, batch=case.batch, length=case.length, optim=case.optim)
        for rung in RUNGS:
            count = of["forward"] + sum(of.get(phase, 0) for phase in REACHES.get(rung, ()))
            yield case.row(part(case, rung).about, counted(count))

    return against_first([[timed(case.clock, part(case, rung), work)] for rung, work in climbed.items()], rows)


def part(case: Case, rung: str) -> Part:
    life = "inference" if rung in RUNGS[:2] else "training"
    phase = "step" if rung == "+ optimizer" else REACHES.get(rung, ("forward",))[-1]
    return Part(life=life, phase=phase, per="step", conditions=case.training(rung=rung))


def memory_row(case: Case, rung: str) -> Row:
    found = run_isolated(peak, case, rung, threads=case.threads, env=HONEST_MALLOC)
    how: RowFields = unavailable(found.reason) if isinstance(found, Failed) else {"value": float(found)}
    return case.row(part(case, rung).about, how, quantity="memory")


def peak(case: Case, rung: str) -> int:
    """Of one rung alone, above what the process held before there was a model; warmed up, so Adam has its state."""
    small = dataclasses.replace(tiny_like(case), export=None, batch=1, length=8)
    rungs(small, master_of(small), *batch_of(small))[rung]()  # loads libraries
    memory = ProcessMemory()
    before = memory.now()
    work = rungs(case, master_of(case), *batch_of(case))[rung]
    work()
    peaks = PeakOf(memory, before)
    with peaks("rung"):
        work()
    return peaks.phases["rung"]


def answer(results: Results) -> str:
    first, *_, last = (only(results, quantity="time", rung=rung) for rung in RUNGS)
    graph = only(results, quantity="time", rung="training mode")
    low, high = (only(results, quantity="memory", rung=rung) for rung in (RUNGS[0], RUNGS[-1]))
    return (
        f"From inference_mode to the whole step time grows {results.judge(last, first).sentence()}, and memory "
        f"{units.times(high.number / low.number)}. The time of the forward alone, keeping what backward needs: "
        f"{results.judge(graph, first).sentence()}."
    )


def main(config: ExperimentConfig) -> None:
    case = case_of(config, "cost_ladder")
    with asking(config, answer) as run:
        run.say(f"measuring cost_ladder{at_most(config.measure)}")
        run.measure(case, bench)
        run.add(memory_row(case, rung) for rung in RUNGS)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
