"""Do the numbers of this tool hold: are equals told apart, what does measuring cost, is planted work found?

    python experiments/self_check.py
    python experiments/self_check.py rounds=20

What measuring and tracking cost is measured alone, and from steps with and without them. On a little model with short
phases, equals are compared `rounds` times and must not be told apart more often than the stated rate. A sleep, a matrix
product, a cast and a tensor that stays are each planted in a phase: they must be found in that phase, in the right
amount, and in no other.

:chapter: Trust
"""

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, ModelConfig, TrackingConfig, at_least
from isoforward.base.estimates import CONFIDENCE, interleaved, judge, ratio
from isoforward.base.results import PHASES, Results, Row
from isoforward.base.stopwatch import Stopwatch, clock_for
from isoforward.formats.export import freeze
from isoforward.measure.case import Case, Laps, batch_of, master_of, record, row, spent, timed
from isoforward.measure.flops import FlopCounter, Scope, by_phase, layers_of
from isoforward.measure.memory_ledger import training_ledger
from isoforward.model import steps
from isoforward.model.gpt import KVCache
from isoforward.model.optim import build
from isoforward.show.compare import only, select
from isoforward.show.wandb_tracker import open_tracker

SLEEP_S = 0.02
SIDE = 768  # of the planted product's matrices, and of what is planted to stay
CAST = 6 * 2**20  # numbers
EVERY = 10  # steps between two words to the tracker, in training
STRETCH = 3  # steps of one sample here
LITTLE = ModelConfig(layers=2, heads=4, width=64, context=64, vocab=256)


@dataclass(frozen=True, kw_only=True)
class SelfCheck(ExperimentConfig):
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rounds", self.rounds, 1)


def planting(work: Callable[[], object], planted_in: str, phase: steps.Phase) -> steps.Phase:
    @contextmanager
    def span(name: str) -> Iterator[None]:
        with phase(name):
            yield
            if name == planted_in:
                work()

    return span


class BothLives:
    """A training step, and two tokens served by the same weights."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.master = master_of(case)
        self.frozen = freeze(self.master)
        self.optimizer = build(self.master, case.optim)
        self.tokens, self.targets = batch_of(case)
        self.cache = KVCache(case.model, batch=1, capacity=case.prompt + 1, dtype=self.frozen.dtype, device=case.device)
        self.stopwatch = Stopwatch(clock_for(torch.device(case.device)))

    def step(self, phase: steps.Phase = steps.unmeasured) -> None:
        steps.train_step(self.master, self.optimizer, self.tokens, self.targets, clip=self.case.optim.clip, phase=phase)

    def run(self, phase: steps.Phase) -> None:
        self.step(phase)
        self.cache.length = 0
        logits = steps.prefill(self.frozen, self.tokens[:1, : self.case.prompt], self.cache, phase=phase)
        steps.decode(self.frozen, logits.argmax(-1, keepdim=True), self.cache, phase=phase)

    def with_planted(self, work: Callable[[], object], planted_in: str) -> dict[str, float]:
        return self.stopwatch.lap(lambda phase: self.run(planting(work, planted_in, phase)))

    def flops(self, work: Callable[[], object], planted_in: str) -> dict[str, int]:
        scope = Scope(layers_of(self.master))
        with scope.following(), FlopCounter(scope) as counter:
            self.run(planting(work, planted_in, scope))
        return by_phase(counter.flops)

    def retained(self, work: Callable[[], object], planted_in: str) -> dict[str, int]:
        def step(*_: object, phase: steps.Phase) -> None:
            self.run(planting(work, planted_in, phase))

        return training_ledger(self.master, self.optimizer, self.tokens, self.targets, step=step).retained


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    lives = BothLives(case)
    little = BothLives(dataclasses.replace(case, model=LITTLE, export=None, batch=2, length=48))
    os.environ["WANDB_MODE"] = "offline"  # its cost is ours; a network's is not
    tracker = open_tracker(
        TrackingConfig(),
        run_dir=Path(packed["results"]).parent / "tracked",
        job_type="train",
        name="self check",
        group=None,
        resolved_config={},
    )
    said = Counter()

    def tell_tracker() -> None:
        said["words"] += 1
        tracker.live(said["words"], {"loss": 1.0, "tokens_per_s": 1.0} | {f"phase/{p}_share": 0.25 for p in PHASES})

    def stretch(metered: bool, tracked: bool) -> None:
        for _ in range(STRETCH):
            if metered:
                lives.stopwatch.lap(lives.step)
            else:
                lives.step()
        if tracked:
            tell_tracker()

    def empty(phase: steps.Phase) -> None:
        for name in PHASES:
            with phase(name):
                pass

    alone = planted_works(case.device)
    costs = {
        "bare": partial(stretch, False, False),
        "metered": partial(stretch, True, False),
        "tracked": partial(stretch, False, True),
        "meter": lambda: [lives.stopwatch.lap(empty) for _ in range(100)],
        "tracker": tell_tracker,
        **{f"{kind} alone": work for kind, work in alone.items()},
    }
    candidates = {name: lambda work=work: {"spent": spent(case, work)} for name, work in costs.items()}
    candidates["nothing planted"] = lambda: little.stopwatch.lap(little.run)
    for kind, work in alone.items():
        for phase in PHASES:
            candidates[f"{kind} in {phase}"] = partial(little.with_planted, work, phase)

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        spent_s = {name: [lap["spent"] for lap in laps[name]] for name in costs}
        for name in ("bare", "metered", "tracked"):
            about = {"life": "training", "phase": "step", "per": "step", "conditions": case.training(how=name)}
            yield row(case, **about, **timed([time_s / STRETCH for time_s in spent_s[name]]))
        for name, calls in (("meter", 100), ("tracker", 1)):
            about = {"life": "training", "phase": "framework", "per": "step", "quantity": "own time"}
            fields = timed([time_s / calls for time_s in spent_s[name]], **about)
            yield row(case, **fields, conditions=case.training(of=name))
        for kind in alone:
            yield from found(little.case, kind, spent_s[f"{kind} alone"], laps)
        yield from exactly(little)
        yield equals(little, packed["rounds"])

    try:
        return record(packed, candidates, tell)
    finally:
        tracker.finish()


def planted_works(device: str) -> dict[str, Callable[[], object]]:
    """Into memory that is there already: what an allocation takes depends on what was freed before it."""
    matrix, numbers = torch.ones(SIDE, SIDE, device=device), torch.ones(CAST, device=device)
    product, cast = torch.empty_like(matrix), torch.empty_like(numbers, dtype=torch.bfloat16)
    return {
        "sleep": partial(time.sleep, SLEEP_S),
        "product": partial(torch.mm, matrix, matrix, out=product),
        "cast": partial(cast.copy_, numbers),
    }


def found(case: Case, kind: str, alone_s: list[float], laps: Laps) -> Iterator[Row]:
    """What a phase took more than in the same round without the plant, as a share of the plant alone: the phase that
    it was planted in, and the other one that most was found in."""
    about = {"quantity": "added time", "unit": "x", "per": "step"}
    for planted_in in PHASES:
        rounds = list(zip(laps[f"{kind} in {planted_in}"], laps["nothing planted"], strict=True))
        more = {phase: [(one[phase] - other[phase]) / median(alone_s) for one, other in rounds] for phase in PHASES}
        elsewhere = max(more.keys() - {planted_in}, key=lambda phase: abs(median(more[phase])))
        for phase in (planted_in, elsewhere):
            conditions = case.training(plant=kind, planted_in=planted_in)
            yield row(case, **timed(more[phase], **about), **at(phase), conditions=conditions)


def exactly(lives: BothLives) -> Iterator[Row]:
    """FLOPs of a planted product, and bytes of a planted tensor that stays, beyond what is there without them."""
    kept: list[torch.Tensor] = []
    matrix = torch.ones(SIDE, SIDE, device=lives.case.device)
    about = {
        "flops": {"unit": "flop", "convention": "model", "provenance": "counted"},
        "retained": {"unit": "byte", "provenance": "counted"},
    }
    counts: dict[str, Callable[[str], Mapping[str, int]]] = {
        "flops": partial(lives.flops, partial(torch.mm, matrix, matrix)),
        "retained": partial(lives.retained, lambda: kept.append(matrix.clone())),
    }
    for quantity, count in counts.items():
        without = count("nowhere")
        for planted_in in PHASES:
            with_ = count(planted_in)
            more = {phase: float(with_.get(phase, 0) - without.get(phase, 0)) for phase in PHASES}
            elsewhere = max(more.keys() - {planted_in}, key=lambda phase: abs(more[phase]))
            for phase in (planted_in, elsewhere):
                fields = {"per": "step", "quantity": quantity, "value": more[phase]}
                conditions = lives.case.training(planted_in=planted_in)
                yield row(lives.case, **at(phase), **about[quantity], **fields, conditions=conditions)


def at(phase: str) -> dict[str, str]:
    return {"life": "inference" if phase in ("prefill", "decode") else "training", "phase": phase}


def equals(lives: BothLives, rounds: int) -> Row:
    """How many of `rounds` comparisons of a forward with itself report a difference."""
    case = lives.case
    forward = partial(spent, case, torch.inference_mode()(lambda: lives.frozen(lives.tokens)))
    different = 0
    for number in range(rounds):
        samples = interleaved({"A": forward, "B": forward}, case.measure.repeats, seed=number)
        different += judge(ratio(samples["A"], samples["B"])).differs
    about = {"life": "inference", "phase": "forward", "quantity": "false differences", "unit": "comparisons"}
    return row(case, **about, per="run", value=float(different), conditions=case.conditions(comparisons=rounds))


def answer(results: Results) -> str:
    bare, metered, tracked = (only(results, phase="step", how=name) for name in ("bare", "metered", "tracked"))

    def cost(of: str, step: Row, calls_per_step: float) -> str:
        own = only(results, of=of)
        paired = ratio(step.samples, bare.samples)
        return (
            f"{own.value * calls_per_step / bare.value:.3%} of a step of {units.seconds(bare.value)} "
            f"({paired.low:.3f}x to {paired.high:.3f}x in pairs)"
        )

    planted = select(results, quantity="added time")
    there = [row.value for row in planted if row.phase == row.conditions["planted_in"]]
    elsewhere = [abs(row.value) for row in planted if row.phase != row.conditions["planted_in"]]
    right = {"flops": 2 * SIDE**3, "retained": 4 * SIDE**2}
    wrong = [
        row
        for quantity, size in right.items()
        for row in select(results, quantity=quantity)
        if row.value != (size if row.phase == row.conditions["planted_in"] else 0)
    ]
    false = only(results, quantity="false differences")
    return (
        f"Equals were told apart {false.value:.0f} times in {false.conditions['comparisons']} (at most "
        f"{1 - CONFIDENCE:.0%} are to be expected). The meter takes {cost('meter', metered, 1)}, tracking "
        f"{cost('tracker', tracked, 1 / EVERY)}. A sleep, a product and a cast planted in each phase in turn were "
        f"found there, {min(there):.0%} to {max(there):.0%} of each, and {max(elsewhere):.1%} at most in any other; "
        f"a product's FLOPs and the bytes of a tensor that stays, {'exactly' if not wrong else 'NOT exactly'}."
    )


def main(config: SelfCheck) -> None:
    ask(config, "self_check", "self_check:measure", answer, rounds=config.rounds)


if __name__ == "__main__":
    sys.exit(run(main, SelfCheck))
