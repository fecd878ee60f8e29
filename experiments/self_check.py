"""Do the numbers of this tool hold?

Equals are compared `rounds` times and must not be told apart more often than the stated rate; the meter's own cost is
taken from steps with and without it; what is planted in a phase must be found there, in the right amount.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from isoforward import steps, units
from isoforward.both_lives import TRAINING, training_candidates
from isoforward.compare import only
from isoforward.config import ExperimentConfig, at_least
from isoforward.entry import run
from isoforward.estimates import CONFIDENCE, interleaved, judge, ratio
from isoforward.experiment import ask
from isoforward.measure import Case, Laps, batch_of, master_of, record, row, spent, timed
from isoforward.meter import Stopwatch, clock_for
from isoforward.optim import build
from isoforward.results import Results, Row
from isoforward.weights import freeze

PLANTED_S = 0.05


@dataclass(frozen=True, kw_only=True)
class SelfCheck(ExperimentConfig):
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rounds", self.rounds, 1)


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    master = master_of(case)
    tokens, targets = batch_of(case)
    training = training_candidates(case, master, tokens, targets)
    optimizer = build(master, case.optim)
    stopwatch = Stopwatch(clock_for(torch.device(case.device)))

    def late(planted: str, phase: str) -> object:
        @contextmanager
        def span() -> Iterator[None]:
            with stopwatch(phase):
                yield
                if phase == planted:
                    time.sleep(PLANTED_S)

        return span()

    def with_sleep(planted: str) -> dict[str, float]:
        with stopwatch.step():
            steps.train_step(master, optimizer, tokens, targets, clip=case.optim.clip, phase=partial(late, planted))
        (lap,) = stopwatch.laps()
        return lap

    candidates = {**training, **{f"planted {phase}": partial(with_sleep, phase) for phase in TRAINING}}

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        at = {"life": "training", "phase": "step", "per": "step"}
        for name, key in (("phased", "step"), ("whole", "whole")):
            samples = [lap[key] for lap in laps[name]]
            yield row(case, **at, **timed(samples), conditions=case.training(metered=name == "phased"))
        for planted in TRAINING:
            for phase in TRAINING:
                pairs = zip(laps[f"planted {planted}"], laps["phased"], strict=True)
                more = [with_[phase] - without[phase] for with_, without in pairs]
                at = {"life": "training", "phase": phase, "per": "step"}
                yield row(case, **at, **timed(more), conditions=case.training(planted_in=planted, difference=True))
        yield equals(case, freeze(master), tokens[:1], packed["rounds"])

    return record(packed, candidates, tell)


def equals(case: Case, model: Callable[[torch.Tensor], object], tokens: torch.Tensor, rounds: int) -> Row:
    """How many of `rounds` comparisons of a forward with itself report a difference."""
    forward = partial(spent, case, torch.inference_mode()(lambda: model(tokens)))
    different = 0
    for number in range(rounds):
        samples = interleaved({"A": forward, "B": forward}, case.measure.repeats, seed=number)
        different += judge(ratio(samples["A"], samples["B"])).outcome != "no difference"
    about = {"life": "inference", "phase": "forward", "quantity": "false differences", "unit": "comparisons"}
    return row(case, **about, per="run", value=float(different), conditions=case.conditions(comparisons=rounds))


def answer(results: Results) -> str:
    metered, bare = (only(results, quantity="time", phase="step", metered=on) for on in (True, False))
    cost = ratio(metered.samples, bare.samples)
    false = only(results, quantity="false differences")
    found = [only(results, planted_in=phase, phase=phase).value for phase in TRAINING]
    elsewhere = [
        abs(only(results, planted_in=planted, phase=phase).value) / only(results, metered=False).value
        for planted in TRAINING
        for phase in TRAINING
        if phase != planted
    ]
    return (
        f"Equals were told apart {false.value:.0f} times in {false.conditions['comparisons']} (at most "
        f"{1 - CONFIDENCE:.0%} are to be expected). Metering makes a step {units.times(cost.value)} as long "
        f"({cost.low:.3f} to {cost.high:.3f}). Of {units.seconds(PLANTED_S)} planted in each phase in turn "
        f"{', '.join(units.seconds(value) for value in found)} were found there, and elsewhere at most "
        f"{max(elsewhere):.1%} of a step."
    )


def main(config: SelfCheck) -> None:
    ask(config, "self_check", "self_check:measure", answer, rounds=config.rounds)


if __name__ == "__main__":
    sys.exit(run(main, "self_check", SelfCheck))
