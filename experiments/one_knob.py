"""Which phase does one setting change, and is the change beyond the noise?

    python experiments/one_knob.py knob=checkpointing values=[none,full]
    python experiments/one_knob.py knob=precision values=[fp32,bf16]
    python experiments/one_knob.py knob=optimizer values=[adamw,muon]

knob is one of precision, checkpointing, batch, length, optimizer, threads, accumulate, compile. Both settings run in
one process, a step of each in every round, and are compared pair by pair.

:chapter: Training against inference
:unread: measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base.checks import one_of
from isoforward.base.config import ExperimentConfig, OptimConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, RowFields, only
from isoforward.base.vocabulary import TRAINING
from isoforward.measure.benchmark import Work
from isoforward.measure.case import Case, batch_of, frozen_of, master_of, with_kernels
from isoforward.measure.passes import Bench, against_first
from isoforward.measure.train_and_serve import Serving, Training

KNOBS = ("precision", "checkpointing", "batch", "length", "optimizer", "threads", "accumulate", "compile")
SERVED = ("forward", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class OneKnob(ExperimentConfig):
    knob: str = "checkpointing"
    values: list[str] = dataclasses.field(default_factory=lambda: ["none", "full"])

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("knob", self.knob, KNOBS)
        if len(set(self.values)) != 2:
            raise BadInput(f"values={self.values} must be two that differ, such as values=[none,full]")
        for value in self.values:
            setting(self.knob, value)


def setting(knob: str, value: str) -> Any:
    if knob in ("batch", "length", "threads", "accumulate"):
        if not (value.isdigit() and int(value) > 0):
            raise BadInput(f"values: {knob} takes a positive whole number, not {value}")
        return int(value)
    if knob == "compile":
        one_of("values", value.lower(), ("true", "false"))
        return value.lower() == "true"
    allowed = {"precision": ("fp32", "bf16"), "checkpointing": ("none", "selective", "full")}
    one_of("values", value, allowed.get(knob, ("adamw", "adam", "sgd", "muon")))
    return value


def turned(case: Case, knob: str, value: str) -> Case:
    chosen = setting(knob, value)
    change = {"optim": OptimConfig(name=chosen)} if knob == "optimizer" else {knob: chosen}
    return with_kernels(dataclasses.replace(case, **change, labels={knob: chosen}))


def works_of(case: Case) -> list[Work]:
    """A training step by phase, the frozen forward, and a generation."""
    master = master_of(case)
    tokens, targets = batch_of(case)
    serving = Serving(case, frozen_of(case, master), tokens)
    training = Training(case, master, tokens, targets)
    return [pinned(case, work) for work in (training.phased, training.whole, serving.forward, serving.generation)]


def pinned(case: Case, work: Work) -> Work:
    """With the threads of its own case."""

    def run(n: int) -> Sequence[float]:
        torch.set_num_threads(case.threads or torch.get_num_threads())
        return work.run(n)

    return Work(parts=work.parts, run=run)


def bench(case: Case, knob: str, values: list[str]) -> Bench:
    return against_first([works_of(turned(case, knob, value)) for value in values])


def answer(knob: str, values: list[str]) -> Callable[[Results], str]:
    def told(results: Results) -> str:
        found: dict[str, list[str]] = {"differs": [], "equal": [], "undecided": []}
        first, second = (setting(knob, value) for value in values)
        for life, phases in (("training", (*TRAINING, "step")), ("inference", SERVED)):
            for phase in phases:
                at: RowFields = {"life": life, "phase": phase, "quantity": "time"}
                one, other = (only(results, **at, **{knob: value}) for value in (first, second))
                judgement = results.judge(other, one)
                outcome = judgement.outcome if judgement.outcome in found else "differs"
                found[outcome].append(f"{life} {phase} {judgement.sentence()}")
        sentences = [f"{knob}={values[1]} against {values[0]} differs: {'; '.join(found['differs']) or 'in no phase'}."]
        for rest in filter(None, (found["equal"], found["undecided"])):
            joined = "; ".join(rest)
            sentences.append(f"{joined[0].upper()}{joined[1:]}.")
        return " ".join(sentences)

    return told


def main(config: OneKnob) -> None:
    for value in config.values:
        if config.knob == "accumulate" and config.data.batch % int(value):
            raise BadInput(f"values: data.batch={config.data.batch} cannot be cut into {value} equal parts")
    ask(config, "one_knob", bench, answer(config.knob, config.values), config.knob, config.values)


if __name__ == "__main__":
    sys.exit(run(main, OneKnob))
