"""What does each rung between inference and a training step add, in time, memory and FLOPs?

    python experiments/cost_ladder.py
    python experiments/cost_ladder.py checkpoint=runs/latest data.batch=8

The same weights run the same batch, first under inference_mode, then with one more part of training at each rung, up to
the whole optimizer step.

:chapter: Training against inference
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.estimates import ratio
from isoforward.base.memory_readers import ProcessMemory
from isoforward.base.results import Results, Row
from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.measure import flops
from isoforward.measure.case import Case, Laps, batch_of, master_of, record, row, spent, timed
from isoforward.measure.memory import HONEST_MALLOC, PeakOf, tiny_like
from isoforward.model import steps
from isoforward.model.gpt import GPT
from isoforward.model.loss import next_token_loss
from isoforward.model.optim import build
from isoforward.show.compare import only

RUNGS = ("inference_mode", "no_grad", "grad, eval", "training mode", "+ loss", "+ backward", "+ optimizer")
REACHES = {"+ loss": ("loss",), "+ backward": ("loss", "backward"), "+ optimizer": ("loss", "backward", "optimizer")}


def rungs(case: Case, model: GPT, tokens: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    optimizer = build(model, case.optim)

    def forward(*, training: bool) -> Tensor:
        return model.train(training)(tokens)

    def loss() -> Tensor:
        return next_token_loss(forward(training=True), targets)

    def backward() -> None:
        loss().backward()
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


def climb(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    candidates = {
        name: lambda name=name, work=work: {name: spent(case, work)}
        for name, work in rungs(case, master_of(case), *batch_of(case)).items()
    }
    counted = flops.count_training(case.model, batch=case.batch, length=case.length, optim=case.optim)

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        for rung in RUNGS:
            life = "inference" if rung in RUNGS[:2] else "training"
            phase = "step" if rung == "+ optimizer" else REACHES.get(rung, ("forward",))[-1]
            at = {"life": life, "phase": phase, "per": "step", "conditions": case.training(rung=rung)}
            yield row(case, **at, **timed([time_s for lap in laps[rung] for time_s in lap.values()]))
            flops = counted["forward"] + sum(counted.get(phase, 0) for phase in REACHES.get(rung, ()))
            how = {"quantity": "flops", "unit": "flop", "provenance": "counted", "convention": "model"}
            yield row(case, **at, **how, value=float(flops))
            peak = run_isolated("cost_ladder:peak", {**packed, "rung": rung}, threads=case.threads, env=HONEST_MALLOC)
            at |= {"quantity": "memory", "unit": "byte"}
            if isinstance(peak, Failed):
                yield row(case, **at, value=None, provenance="unavailable", reason=peak.reason)
            else:
                yield row(case, **at, value=float(peak))

    return record(packed, candidates, tell)


def peak(packed: dict) -> int:
    """Of one rung alone, above what the process held before there was a model; warmed up, so Adam has its state."""
    case = Case.unpack(packed["case"])
    small = dataclasses.replace(case, model=tiny_like(case.model), export=None, batch=1, length=8)
    rungs(small, master_of(small), *batch_of(small))[packed["rung"]]()  # loads libraries
    memory = ProcessMemory()
    before = memory.now()
    work = rungs(case, master_of(case), *batch_of(case))[packed["rung"]]
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
        f"From inference_mode to the whole step time grows {units.times(ratio(last.samples, first.samples).value)} and "
        f"memory {units.times(high.value / low.value)}; keeping what backward needs makes the forward alone "
        f"{units.times(ratio(graph.samples, first.samples).value)} as long."
    )


def main(config: ExperimentConfig) -> None:
    ask(config, "cost_ladder", "cost_ladder:climb", answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
