"""Which phase does one setting change, and is the change beyond the noise?

    python experiments/one_knob.py knob=checkpointing values=[none,full]
    python experiments/one_knob.py knob=precision values=[fp32,bf16]
    python experiments/one_knob.py knob=optimizer values=[adamw,muon]

knob is one of precision, checkpointing, batch, length, optimizer, threads, accumulate, compile. Both settings run in
one process, a step of each in every round, and are compared pair by pair.

:chapter: Training against inference
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, OptimConfig, one_of
from isoforward.base.errors import BadInput
from isoforward.base.estimates import judge, ratio
from isoforward.base.results import TRAINING, Results, Row
from isoforward.formats.export import freeze
from isoforward.measure.case import Case, Laps, batch_of, master_of, record, row, timed
from isoforward.measure.train_and_serve import by_name, serving_candidates, training_candidates
from isoforward.show.compare import only

KNOBS = ("precision", "checkpointing", "batch", "length", "optimizer", "threads", "accumulate", "compile")
SERVING = {"frozen": "forward", "prefill": "prefill", "decode": "decode"}


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
    return dataclasses.replace(case, **change, labels={knob: chosen})


def candidates(case: Case) -> dict[str, Callable[[], dict[str, float]]]:
    master = master_of(case)
    tokens, targets = batch_of(case)
    serving = serving_candidates(case, freeze(master), tokens)
    training = training_candidates(case, master, tokens, targets)

    def pinned(work: Callable[[], dict[str, float]]) -> dict[str, float]:
        torch.set_num_threads(case.threads or torch.get_num_threads())
        return work()

    chosen = {"phased": training["phased"], "frozen": serving["frozen"], "generation": serving["generation"]}
    return {name: lambda work=work: pinned(work) for name, work in chosen.items()}


def measure(packed: dict) -> str:
    cases = {value: turned(Case.unpack(packed["case"]), packed["knob"], value) for value in packed["values"]}
    every = {f"{value} {name}": work for value, case in cases.items() for name, work in candidates(case).items()}

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        for value, case in cases.items():
            samples = by_name({name: rounds for name, rounds in laps.items() if name.startswith(f"{value} ")})
            for phase in (*TRAINING, "step"):
                at = {"life": "training", "phase": phase, "per": "step", "conditions": case.training()}
                yield row(case, **at, **timed(samples[phase]))
            for name, phase in SERVING.items():
                per = {"forward": "step", "prefill": "sequence", "decode": "token"}[phase]
                executions = case.new_tokens - 1 if phase == "decode" else 1
                at = {"life": "inference", "phase": phase, "per": per}
                conditions = case.conditions(executions=executions)
                yield row(case, **at, **timed(samples[name]), conditions=conditions)

    return record(packed, every, tell)


def answer(knob: str, values: list[str]) -> Callable[[Results], str]:
    def told(results: Results) -> str:
        changed: list[str] = []
        unchanged: dict[str, list[str]] = {"no difference": [], "too few samples": []}
        first, second = (setting(knob, value) for value in values)
        for life, phases in (("training", (*TRAINING, "step")), ("inference", tuple(SERVING.values()))):
            for phase in phases:
                one, other = (only(results, life=life, phase=phase, **{knob: value}) for value in (first, second))
                judgement = judge(ratio(other.samples, one.samples))
                name = f"{life} {phase}"
                if judgement.differs:
                    found = judgement.ratio
                    interval = f"{units.digits(found.low)} to {units.digits(found.high)}"
                    changed.append(f"{name} {judgement.outcome}, {units.times(found.value)} ({interval})")
                else:
                    unchanged[judgement.outcome].append(name)
        sentences = [f"{knob}={values[1]} against {values[0]}: {'; '.join(changed) or 'no phase changed'}."]
        sentences += [f"{outcome.capitalize()} in {', '.join(names)}." for outcome, names in unchanged.items() if names]
        return " ".join(sentences)

    return told


def main(config: OneKnob) -> None:
    for value in config.values:
        if config.knob == "accumulate" and config.data.batch % int(value):
            raise BadInput(f"values: data.batch={config.data.batch} cannot be cut into {value} equal parts")
    more = {"knob": config.knob, "values": config.values}
    ask(config, "one_knob", "one_knob:measure", answer(config.knob, config.values), **more)


if __name__ == "__main__":
    sys.exit(run(main, OneKnob))
