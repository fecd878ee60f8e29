"""Do the numbers of this tool hold: are equals told apart, what does measuring cost, is planted work found?

    python experiments/self_check.py
    python experiments/self_check.py rounds=40 hog=true
    python experiments/self_check.py rounds=40 longer=[step] seconds=60 little=false

What measuring and tracking cost is measured alone, and from steps with and without them. A sleep, a matrix product, a
cast and a tensor that stays are each planted in a phase: they must be found in that phase, in the right amount, and in
no other. Then `rounds` comparisons of each kind show how often the rule decides rightly: a step with itself, with one
that takes 2% more, and with one of which a single phase takes 5% more. `hog` lets another process compute meanwhile.

:chapter: Trust
:unread: measure.context measure.energy measure.new_tokens optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.checks import at_least, one_of
from isoforward.base.config import ExperimentConfig, ModelConfig, TrackingConfig
from isoforward.base.device import device_of
from isoforward.base.results import Results, Row, RowFields, only, select
from isoforward.base.stopwatch import Stopwatch
from isoforward.base.vocabulary import PHASES, Condition
from isoforward.measure.benchmark import Measured, Pair, Part, Work, measure, phased, timed
from isoforward.measure.case import Case, batch_of, frozen_of, master_of
from isoforward.measure.flops import FlopCounter, Scope, by_phase, layers_of
from isoforward.measure.memory_ledger import training_ledger
from isoforward.measure.passes import Bench, derived
from isoforward.measure.trust import findings, verdict
from isoforward.model import steps
from isoforward.model.gpt import KVCache
from isoforward.model.optim import build
from isoforward.show.wandb_tracker import open_tracker

SLEEP_S = 0.02
SIDE = 768  # of the planted product's matrices, and of what is planted to stay
CAST = 6 * 2**20  # numbers
EVERY = 10  # steps between two words to the tracker, in training
LONGER = {"nothing": 0.0, "step": 0.02, "loss": 0.05, "optimizer": 0.05, "decode": 0.05}  # by what share
LITTLE = ModelConfig(layers=2, heads=4, width=64, context=64, vocab=256)


@dataclass(frozen=True, kw_only=True)
class SelfCheck(ExperimentConfig):
    rounds: int = 20  # comparisons of each kind
    seconds: float = 3.0  # for each, at most
    longer: list[str] = field(default_factory=lambda: list(LONGER))  # what takes more in the second of a comparison
    little: bool = True  # compare steps of a little model; false: of `model`
    hog: bool = False  # beside a process that computes all the time

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rounds", self.rounds, 1)
        at_least("seconds", self.seconds, 0.1)
        for name in self.longer:
            one_of("longer", name, tuple(LONGER))


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
        self.frozen = frozen_of(case, self.master)
        self.optimizer = build(self.master, case.optim)
        self.tokens, self.targets = batch_of(case)
        self.cache = KVCache(case.model, batch=1, capacity=case.prompt + 1, dtype=self.frozen.dtype, device=case.device)
        self.stopwatch = Stopwatch(device_of(case.device))

    def step(self, phase: steps.Phase = steps.unmeasured) -> None:
        steps.train_step(self.master, self.optimizer, self.tokens, self.targets, clip=self.case.optim.clip, phase=phase)

    def run(self, phase: steps.Phase) -> None:
        self.step(phase)
        self.cache.rewind(0)
        logits = steps.prefill(self.frozen, self.tokens[:1, : self.case.prompt], self.cache, phase=phase)
        steps.decode(self.frozen, logits.argmax(-1, keepdim=True), self.cache, phase=phase)

    def part(self, phase: str, *, quantity: str = "time", **more: Condition) -> Part:
        own = {"life": life_of(phase), "phase": phase, "per": "step", "quantity": quantity}
        return Part(**own, conditions=self.case.training(**more))

    def phased(self, run: Callable[[steps.Phase], object], *, quantity: str = "time", **more: Condition) -> Work:
        parts = {phase: self.part(phase, quantity=quantity, **more) for phase in PHASES}
        return phased(self.case.clock, parts, run)

    def run_with(self, work: Callable[[], object], planted_in: str, phase: steps.Phase) -> None:
        self.run(planting(work, planted_in, phase))

    def flops(self, work: Callable[[], object], planted_in: str) -> dict[str, int]:
        scope = Scope(layers_of(self.master))
        with scope.following(), FlopCounter(scope) as counter:
            self.run(planting(work, planted_in, scope))
        return by_phase(counter.flops)

    def retained(self, work: Callable[[], object], planted_in: str) -> dict[str, int]:
        def step(*_: object, phase: steps.Phase) -> None:
            self.run(planting(work, planted_in, phase))

        return training_ledger(self.master, self.optimizer, self.tokens, self.targets, step=step).retained


def bench(case: Case, asked: SelfCheck, directory: str) -> Bench:
    lives = BothLives(case)
    little = BothLives(dataclasses.replace(case, model=LITTLE, export=None, batch=2, length=48))
    os.environ["WANDB_MODE"] = "offline"  # its cost is ours; a network's is not
    about: dict[str, Any] = {"job_type": "train", "name": "self check", "group": None, "resolved_config": {}}
    tracker = open_tracker(TrackingConfig(), run_dir=Path(directory), **about)
    said = itertools.count()

    def tell_tracker() -> None:
        figures = {"loss": 1.0, "tokens_per_s": 1.0} | {f"phase/{p}_share": 0.25 for p in PHASES}
        tracker.live(next(said), figures)

    def metered() -> None:
        lives.stopwatch.lap(lives.step)

    def tracked() -> None:
        lives.step()
        tell_tracker()

    def empty(phase: steps.Phase) -> None:
        for name in PHASES:
            with phase(name):
                pass

    def step(how: str, work: Callable[[], object]) -> Work:
        return timed(case.clock, case.step("step", how=how), work)

    def own(of: str, work: Callable[[], object]) -> Work:
        part = dataclasses.replace(case.step("framework", of=of), quantity="own time")
        return timed(case.clock, part, work)

    bare, *others = (step("bare", lives.step), step("metered", metered), step("tracked", tracked))
    instruments = [own("meter", lambda: lives.stopwatch.lap(empty)), own("tracker", tell_tracker)]
    alone = planted_works(case.device)
    planted = Planted(little, alone)
    pairs = [(each.part, bare.part) for each in others] + planted.pairs

    def rows(measured: Measured) -> Iterator[Row]:
        tracker.finish()
        yield from planted.rows(measured)
        yield from exactly(little)
        yield from decided(little if asked.little else lives, asked)

    return Bench(works=[bare, *others, *instruments, *planted.works], pairs=pairs, rows=rows)


class Planted:
    """Both lives of the little model with each kind of work planted in each phase, beside the same with nothing."""

    def __init__(self, lives: BothLives, alone: Mapping[str, Callable[[], object]]) -> None:
        self.lives, case = lives, lives.case
        self.alone: dict[str, Work] = {}
        self.plants: dict[tuple[str, str], tuple[Work, Work]] = {}
        for kind, work in alone.items():
            part = dataclasses.replace(case.step("framework", plant=kind, planted_in="-"), quantity="own time")
            self.alone[kind] = timed(case.clock, part, work)
            for phase in PHASES:
                planted, nowhere = partial(lives.run_with, work, phase), f"{kind} {phase}"
                self.plants[kind, phase] = (
                    lives.phased(planted, quantity="own time", plant=kind, planted_in=phase),
                    lives.phased(lives.run, quantity="own time", plant="nothing", planted_in=nowhere),
                )

    @property
    def works(self) -> list[Work]:
        return [*self.alone.values(), *(work for both in self.plants.values() for work in both)]

    @property
    def pairs(self) -> list[Pair]:
        return [(with_.parts[0], without.parts[0]) for with_, without in self.plants.values()]

    def rows(self, measured: Measured) -> Iterator[Row]:
        """What a phase took more than beside it without the plant, as a share of the plant alone: the phase that it was
        planted in, and the other one that most was found in."""
        for (kind, planted_in), (with_, without) in self.plants.items():
            alone_s = measured.estimate(*self.alone[kind].parts).median
            pairs = measured.paired(*with_.parts, *without.parts)
            more = {
                phase: [(each[n] - each[n + len(PHASES)]) / alone_s for each in pairs] for n, phase in enumerate(PHASES)
            }
            for phase in there_and_elsewhere({phase: median(samples) for phase, samples in more.items()}, planted_in):
                part = self.lives.part(phase, plant=kind, planted_in=planted_in)
                yield derived(self.lives.case, part, more[phase], quantity="added time")


def there_and_elsewhere(found: Mapping[str, float], planted_in: str) -> tuple[str, str]:
    return planted_in, max(found.keys() - {planted_in}, key=lambda phase: abs(found[phase]))


def planted_works(device: str) -> dict[str, Callable[[], object]]:
    """Into memory that is there already: what an allocation takes depends on what was freed before it."""
    matrix, numbers = torch.ones(SIDE, SIDE, device=device), torch.ones(CAST, device=device)
    product, cast = torch.empty_like(matrix), torch.empty_like(numbers, dtype=torch.bfloat16)
    return {
        "sleep": partial(time.sleep, SLEEP_S),
        "product": partial(torch.mm, matrix, matrix, out=product),
        "cast": partial(cast.copy_, numbers),
    }


def exactly(lives: BothLives) -> Iterator[Row]:
    """FLOPs of a planted product, and bytes of a planted tensor that stays, beyond what is there without them."""
    kept: list[torch.Tensor] = []
    matrix = torch.ones(SIDE, SIDE, device=lives.case.device)
    counts: dict[str, Callable[[str], Mapping[str, int]]] = {
        "flops": partial(lives.flops, partial(torch.mm, matrix, matrix)),
        "retained": partial(lives.retained, lambda: kept.append(matrix.clone())),
    }
    for quantity, count in counts.items():
        without = count("nowhere")
        for planted_in in PHASES:
            with_ = count(planted_in)
            more = {phase: float(with_.get(phase, 0) - without.get(phase, 0)) for phase in PHASES}
            for phase in there_and_elsewhere(more, planted_in):
                how: RowFields = {"provenance": "counted", "convention": "model" if quantity == "flops" else None}
                about = lives.part(phase, planted_in=planted_in).about
                yield lives.case.row(about, how, quantity=quantity, value=more[phase])


def life_of(phase: str) -> str:
    return "inference" if phase in ("prefill", "decode") else "training"


def decided(lives: BothLives, asked: SelfCheck) -> Iterator[Row]:
    """How many of `rounds` comparisons come out how, whether their verdict trusts them, and whether it names the hog.

    Each has the budget of one comparison, and the four looks of the stopping rule.
    """
    case = lives.case
    plan = dataclasses.replace(case.measure, repeats=None, budget=asked.seconds)
    with hog() if asked.hog else nullcontext():
        for longer in asked.longer:
            counts: Counter[tuple[str, str]] = Counter()
            for number in range(asked.rounds):
                first, second = one_longer(lives, longer)
                pairs = list(zip(first.parts, second.parts, strict=True))
                measured = measure([first, second], pairs, plan, seed=number)
                for pair in pairs:
                    found = measured.judgement(pair)
                    counts[pair[0].phase, "differs" if found.differs else found.outcome] += 1
                told = verdict("self_check", [findings(measured)], plan)
                counts["run", "trusted"] += told.trusted
                counts["run", "names another process"] += any("mostly" in reason for reason in told.reasons)
            phases = dict.fromkeys(phase for phase, _ in counts if phase != "run")
            outcomes = [(phase, outcome) for phase in phases for outcome in ("differs", "equal", "undecided")]
            for phase, outcome in (*outcomes, ("run", "trusted"), ("run", "names another process")):
                about: RowFields = {"life": life_of(phase), "phase": phase, "quantity": "decided", "per": "run"}
                conditions = case.conditions(
                    longer=longer, outcome=outcome, comparisons=asked.rounds, seconds=asked.seconds, hog=asked.hog
                )
                yield case.row(about, value=float(counts[phase, outcome]), conditions=conditions)


def one_longer(lives: BothLives, longer: str) -> tuple[Work, Work]:
    """What takes its share more in one place, and the same without. A whole step, or both lives phase by phase."""
    case = lives.case
    if longer in ("nothing", "step"):
        bare = timed(case.clock, case.step("step", longer="no"), lives.step)
        (step_s,) = bare.run(10)

        def longer_step() -> None:
            lives.step()
            spin(LONGER[longer] * step_s)

        return timed(case.clock, case.step("step", longer="yes"), longer_step), bare

    def work(label: str, more: Callable[[], object]) -> Work:
        return lives.phased(partial(lives.run_with, more, longer), longer=label)

    bare = work("no", partial(spin, 0.0))
    phase_s = bare.run(10)[list(PHASES).index(longer)]
    return work("yes", partial(spin, LONGER[longer] * phase_s)), bare


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


@contextmanager
def hog() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def answer(results: Results) -> str:
    bare, metered, tracked = (only(results, phase="step", how=name) for name in ("bare", "metered", "tracked"))

    def cost(of: str, step: Row, calls_per_step: float) -> str:
        own = only(results, of=of)
        paired = results.judge(step, bare).ratio
        return (
            f"{own.number * calls_per_step / bare.number:.3%} of a step of {units.seconds(bare.number)} "
            f"({paired.low:.3f}x to {paired.high:.3f}x in pairs)"
        )

    planted = select(results, quantity="added time")
    there = [row.number for row in planted if row.phase == row.conditions["planted_in"]]
    elsewhere = [abs(row.number) for row in planted if row.phase != row.conditions["planted_in"]]
    right = {"flops": 2 * SIDE**3, "retained": 4 * SIDE**2}
    wrong = [
        row
        for quantity, size in right.items()
        for row in select(results, quantity=quantity)
        if row.value != (size if row.phase == row.conditions["planted_in"] else 0)
    ]
    return (
        f"{decisions(select(results, quantity='decided'))} The meter takes {cost('meter', metered, 1)}, tracking "
        f"{cost('tracker', tracked, 1 / EVERY)}. A sleep, a product and a cast planted in each phase in turn were "
        f"found there, {min(there):.0%} to {max(there):.0%} of each, and {max(elsewhere):.1%} at most in any other; "
        f"a product's FLOPs and the bytes of a tensor that stays, {'exactly' if not wrong else 'NOT exactly'}."
    )


def decisions(rows: Sequence[Row]) -> str:
    told = []
    for longer in dict.fromkeys(str(row.conditions["longer"]) for row in rows):
        those = [row for row in rows if row.conditions["longer"] == longer]
        of = {(row.phase, str(row.conditions["outcome"])): row.number for row in those}
        where = longer if longer in PHASES else "step"
        counts = ", ".join(f"{outcome} {of[where, outcome]:.0f}" for outcome in ("differs", "equal", "undecided"))
        others = [of[phase, outcome] for phase, outcome in of if outcome == "differs" and phase != where]
        elsewhere = f", another phase differs {max(others):.0f} at most" if others else ""
        what = "a step with itself" if longer == "nothing" else f"with {LONGER[longer]:.0%} more in the {longer}"
        told.append(f"{what}: {counts}{elsewhere}, trusted {of['run', 'trusted']:.0f}")
    about = rows[0].conditions
    beside = " beside a process that computes all the time" if about["hog"] else ""
    return f"Of {about['comparisons']} comparisons each of at most {about['seconds']:g} s{beside}, {'; '.join(told)}."


def main(config: SelfCheck) -> None:
    with tempfile.TemporaryDirectory() as directory:
        ask(config, "self_check", bench, answer, config, directory)


if __name__ == "__main__":
    sys.exit(run(main, SelfCheck))
