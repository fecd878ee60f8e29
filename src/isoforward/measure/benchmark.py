"""Times pieces of work until they are known as precisely as asked, or the budget is spent.

What is compared runs one directly after the other, the order of each pair drawn by a fair coin: the ratio is then
valid whatever the machine does meanwhile (base/statistics.py says why). A sample that something else disturbed is taken
again, with its pair, and kept apart; what is slow without a cause stays.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from isoforward.base import disturbance, units
from isoforward.base.config import MeasureConfig
from isoforward.base.disturbance import Disturbance, Reading
from isoforward.base.errors import BadInput
from isoforward.base.results import RowFields
from isoforward.base.statistics import FEWEST, LOOKS, ONE_LOOK, Estimate, Judgement, Look, judge, ratio, summarise
from isoforward.base.stopwatch import Clock, Stopwatch
from isoforward.base.vocabulary import Condition

SHORTEST_S = 1e-2  # that the shortest part of a sample lasts, as far as LONGEST_S allows
LONGEST_S = 0.1  # of a sample of several executions
RETAKEN = 0.5  # of the samples of a pair, at most
TRIES = 3  # at one sample
TICK_S = 1e-6  # to which the clocks of the devices agree with themselves: CUDA's events have half of it
REFERENCE_SHARE = 0.1  # of the time, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One of the times that a piece of work gives, as its row will name it."""

    life: str
    phase: str
    per: str
    conditions: Mapping[str, Condition]
    quantity: str = "time"

    @property
    def about(self) -> RowFields:
        """Fields of its row."""
        return {"life": self.life, "phase": self.phase, "per": self.per, "conditions": self.conditions}

    def labelled(self, **more: Condition) -> Part:
        return replace(self, conditions={**self.conditions, **more})


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """`run(n)` executes n times and gives the seconds of one execution, part by part."""

    parts: tuple[Part, ...]
    run: Callable[[int], Sequence[float]]
    most: int | None = None  # executions that one sample can hold

    @property
    def part(self) -> Part:
        """The one that it has."""
        (only,) = self.parts
        return only

    def labelled(self, **more: Condition) -> Work:
        """The same work, with more conditions in the rows of all its parts."""
        return replace(self, parts=tuple(part.labelled(**more) for part in self.parts))


Pair = tuple[Part, Part]


def part_by_part(works: Iterable[Work], others: Iterable[Work]) -> list[Pair]:
    """Every part of the works against the same part of the others."""
    both = zip(works, others, strict=True)
    return [pair for one, other in both for pair in zip(one.parts, other.parts, strict=True)]


def timed(
    clock: Clock,
    part: Part,
    execute: Callable[[], object],
    *,
    count: int = 1,
    prepare: Callable[[int], object] | None = None,
    most: int | None = None,
) -> Work:
    """One call of `execute` is `count` executions; `prepare(n)` runs before the n calls of a sample, untimed."""

    def run(n: int) -> Sequence[float]:
        if prepare is not None:
            prepare(n)
        start = clock.mark()
        for _ in range(n):
            execute()
        end = clock.mark()
        clock.settle()
        return (clock.seconds(start, end) / (n * count),)

    return Work(parts=(part,), run=run, most=most)


def phased(clock: Clock, parts: Mapping[str, Part], step: Callable[[Stopwatch], object]) -> Work:
    """A step that names its phases to the stopwatch it is given; `parts` by phase."""
    stopwatch = Stopwatch(clock)

    def run(n: int) -> Sequence[float]:
        for _ in range(n):
            with stopwatch.step():
                step(stopwatch)
        laps = stopwatch.laps()
        return [sum(lap.get(name, 0.0) for lap in laps) / n for name in parts]

    return Work(parts=tuple(parts.values()), run=run)


@dataclass(kw_only=True, eq=False)
class Block:
    """A pair of works that run one directly after the other, or one work alone."""

    works: tuple[Work, ...]
    pairs: tuple[Pair, ...]  # of their parts, to be compared
    samples: dict[Part, list[float]] = field(default_factory=dict)
    retaken: dict[Part, list[float]] = field(default_factory=dict)
    order: list[float] = field(default_factory=list)  # of each pair: 1 where the first work ran first, else -1
    disturbed: int = 0  # samples kept although disturbed, when too many had been taken again
    again: int = 0  # pairs taken again
    look: Look = ONE_LOOK
    spent_s: float = 0.0

    def __post_init__(self) -> None:
        for part in self.parts:
            self.samples[part], self.retaken[part] = [], []

    @property
    def parts(self) -> list[Part]:
        return [part for work in self.works for part in work.parts]

    @property
    def n(self) -> int:
        return len(self.order)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a live line shows."""

    known: int  # times, as the verdict counts them
    asked: int
    worst: float | None  # half-width of the least precise of the other times, relative to the whole it is a part of
    left_s: float
    disturbance: Disturbance  # so far
    busiest: tuple[str, float]  # as of Measured


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    blocks: Sequence[Block]
    references: Mapping[Part, Sequence[float]]
    disturbance: Disturbance  # over all
    busiest: tuple[str, float]  # the other process that used most processor time, and how much of it
    precision: float
    margin: float
    stopped: bool  # by the user, before it was done

    def estimate(self, part: Part) -> Estimate:
        """From all samples of the part, in order of time within each pair."""
        blocks = [block for block in self.blocks if part in block.samples]
        samples = [sample for block in blocks for sample in block.samples[part]]
        return summarise(samples, look=max((block.look for block in blocks), key=lambda look: look.count))

    def block(self, pair: Pair) -> Block:
        return next(block for block in self.blocks if pair in block.pairs)

    def judgement(self, pair: Pair) -> Judgement:
        return _judged(self.block(pair), pair, self.margin)

    def paired(self, *parts: Part) -> list[tuple[float, ...]]:
        """Samples of parts of one pair of works, pair by pair."""
        block = next(block for block in self.blocks if all(part in block.samples for part in parts))
        return list(zip(*(block.samples[part] for part in parts), strict=True))


def measure(
    works: Sequence[Work],
    pairs: Sequence[Pair],
    plan: MeasureConfig,
    *,
    seed: int,
    references: Sequence[Work] = (),
    show: Callable[[Progress], object] | None = None,
    look: Callable[[], Reading] = disturbance.look,
    fewest: int = 1,
) -> Measured:
    """Times every part of `works`, and the `pairs` of parts against each other, by `plan`.

    With `plan.repeats` each pair is timed that often; else until every time is known to `plan.precision` and every
    comparison is settled, or `plan.budget` seconds are spent: at four planned looks, over all of which the stated
    confidence holds. Ctrl-C ends it early, with what is there. Raises BadInput where the budget is too short for
    `fewest` samples of each work, or the precision finer than the clock.
    """
    draw = random.Random(seed)
    blocks = blocks_of(works, pairs)
    sized = {work: _count(work, plan) for work in dict.fromkeys((*works, *references))}
    counts = {work: count for work, (count, _) in sized.items()}
    samples_s = sum(sized[work][1] for block in blocks for work in block.works)
    if plan.repeats is None and fewest * samples_s > plan.budget:
        short = "is shorter than one sample" if fewest == 1 else f"has no room for {fewest} samples"
        raise BadInput(
            f"measure.budget={plan.budget:g} {short} of each, which takes {fewest * samples_s:.2g} s; "
            f"write measure.budget={math.ceil(max(10, 2 * fewest) * samples_s)}"
        )
    kept: dict[Part, list[float]] = {part: [] for work in references for part in work.parts}
    looks = [ONE_LOOK] if plan.repeats is not None else list(LOOKS)
    active, stopped, rounds = list(blocks), False, 0
    before, usage = look(), disturbance.process_times_s()
    started, shown, references_s = time.perf_counter(), 0.0, 0.0
    try:
        while active:
            for block in draw.sample(active, len(active)):
                _sample(block, counts, draw, look)
            rounds += 1
            elapsed_s = time.perf_counter() - started
            if references_s <= REFERENCE_SHARE * elapsed_s:
                begun = time.perf_counter()
                for work in references:
                    for part, took_s in zip(work.parts, work.run(counts[work]), strict=True):
                        kept[part].append(took_s)
                references_s += time.perf_counter() - begun
            spent = rounds / plan.repeats if plan.repeats is not None else elapsed_s / plan.budget
            due = [planned for planned in looks if spent >= planned.share]
            if rounds >= FEWEST and due:
                looks = looks[len(due) :]
                for block in active:
                    block.look, block.spent_s = due[-1], elapsed_s
                active = [block for block in active if looks and not _settled(block, plan)]
            if show is not None and elapsed_s - shown > 0.25:
                shown = elapsed_s
                so_far = disturbance.between(before, look())
                by = disturbance.busiest(usage, disturbance.process_times_s()) if so_far.disturbed else ("", 0.0)
                show(_progress(blocks, plan, so_far, by))
    except KeyboardInterrupt:
        stopped = True
    return Measured(
        blocks=[block for block in blocks if block.n >= FEWEST],
        references=kept,
        disturbance=disturbance.between(before, look()),
        busiest=disturbance.busiest(usage, disturbance.process_times_s()),
        precision=plan.precision,
        margin=plan.margin,
        stopped=stopped,
    )


def blocks_of(works: Sequence[Work], pairs: Sequence[Pair]) -> list[Block]:
    """One for each two works that are compared, and for each work that is compared with none, or with itself alone."""
    of = {part: work for work in works for part in work.parts}
    together: dict[tuple[Work, ...], list[Pair]] = {}
    for first, second in pairs:
        key = (of[first],) if of[first] is of[second] else (of[first], of[second])
        key = key[::-1] if key[::-1] in together else key
        together.setdefault(key, []).append((first, second))
    blocks = [Block(works=key, pairs=tuple(compared)) for key, compared in together.items()]
    placed = {work for key in together for work in key}
    return blocks + [Block(works=(work,), pairs=()) for work in works if work not in placed]


def _sample(block: Block, counts: Mapping[Work, int], draw: random.Random, look: Callable[[], Reading]) -> None:
    """One of each work of the block, taken again where something else disturbed them."""
    for attempt in range(TRIES):
        order = list(block.works)
        turned = draw.random() < 0.5
        if turned:
            order.reverse()
        before = look()
        took = {work: work.run(counts[work]) for work in order}
        disturbed = disturbance.between(before, look()).disturbed
        may_retake = attempt + 1 < TRIES and block.again < 3 + RETAKEN * block.n
        into = block.retaken if disturbed and may_retake else block.samples
        for work, times in took.items():
            for part, time_s in zip(work.parts, times, strict=True):
                into[part].append(time_s)
        if into is block.samples:
            block.order.append(-1.0 if turned else 1.0)
            block.disturbed += disturbed
            return
        block.again += 1


def _count(work: Work, plan: MeasureConfig) -> tuple[int, float]:
    """Executions of one sample, and its seconds: no part below SHORTEST_S, unless the whole went beyond LONGEST_S."""
    for _ in range(plan.warmup):
        times = work.run(1)
    begun = time.perf_counter()
    times = work.run(1)
    whole_s = time.perf_counter() - begun  # with what is prepared and not timed
    shortest_s = max(min(times), 1e-9)
    wanted, room = math.ceil(SHORTEST_S / shortest_s), math.floor(LONGEST_S / max(whole_s, 1e-9))
    count = max(1, min(wanted, room, work.most or wanted))
    sample_s = max(count * sum(times), 1e-9)
    if plan.precision * sample_s < TICK_S:  # by which any number of samples is off together
        named = " and ".join(f"{part.life} {part.phase}" for part in work.parts)
        raise BadInput(
            f"measure.precision={plan.precision:g} is finer than the clock gives: a sample of {named} lasts "
            f"{units.seconds(sample_s)}, and a tick {units.seconds(TICK_S)}; make the work larger, "
            f"or write measure.precision={min(1.0, 2 * TICK_S / sample_s):.1g}"
        )
    return count, count * whole_s


def half_widths(estimates: Sequence[Estimate]) -> list[float]:
    """Of the parts of one work, each relative to the whole that they are parts of."""
    whole_s = sum(abs(estimate.median) for estimate in estimates)
    halves = [(estimate.interval.high - estimate.interval.low) / 2 for estimate in estimates]
    return [half / whole_s if whole_s else 0.0 for half in halves]


def _judged(block: Block, pair: Pair, margin: float) -> Judgement:
    first, second = (block.samples[part] for part in pair)
    turned = pair[0] in block.works[-1].parts
    covariate = [-one for one in block.order] if turned else block.order
    drawn = len(block.works) == 2 and block.n >= 30  # the parts of one work run in one order; few pairs gain nothing
    found = ratio(first, second, covariate=covariate if drawn else None, look=block.look)
    return judge(found, margin=margin, spent_s=block.spent_s)


def _settled(block: Block, plan: MeasureConfig) -> bool:
    for work in block.works:
        estimates = [summarise(block.samples[part], look=block.look) for part in work.parts]
        if not all(one.interval.reached for one in estimates) or max(half_widths(estimates)) > plan.precision:
            return False
    return all(_judged(block, pair, plan.margin).settled for pair in block.pairs)


def _progress(
    blocks: Sequence[Block],
    plan: MeasureConfig,
    so_far: Disturbance,
    busiest: tuple[str, float],
) -> Progress:
    parts = {part for block in blocks for part in block.parts}
    known: dict[Part, bool] = {}
    halves: dict[Part, float] = {}
    placed = [(work, block) for block in blocks if block.n >= FEWEST for work in block.works]
    for work, block in placed:
        estimates = [summarise(block.samples[part], look=block.look) for part in work.parts]
        for part, estimate, half in zip(work.parts, estimates, half_widths(estimates), strict=True):
            known[part], halves[part] = half <= plan.precision and estimate.interval.reached, half
    return Progress(
        known=sum(known.values()),
        asked=len(parts),
        worst=max((half for part, half in halves.items() if not known[part]), default=None),
        left_s=max(0.0, plan.budget - so_far.elapsed_s) if plan.repeats is None else 0.0,
        disturbance=so_far,
        busiest=busiest,
    )
