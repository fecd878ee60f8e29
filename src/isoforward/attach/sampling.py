"""Which steps are timed phase by phase: few enough that the training is hardly slowed, none at a fixed place.

What it costs is measured as the training runs: by how much timed steps are longer than those that are not, and how long
it takes to set what times them and to undo it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from statistics import median

from isoforward.base.checks import at_least
from isoforward.base.statistics import FEWEST

TIMED, WHOLE, WARMUP, COUNTED = "timed", "whole", "warmup", "counted"
BOUND = 0.003  # of the time of all steps, that timing some of them may take: a third of what watching may take in all
ENOUGH, RARER = 24, 4  # so many timed steps say most of it: from then on there are RARER times fewer
JUDGED = 64  # timed steps, the last, that their cost is had from
BESIDE = 8  # steps that were not timed by phase, the last before it, that each is held against


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which steps are timed phase by phase. The others have their whole timed, with few hooks."""

    every: int = 4  # one of so many at most, at a place that is drawn: a fixed stride could fall in with the loop's own
    warmup: int = 3  # steps left out at the beginning
    count_flops: bool = True  # in one step after the warm-up, which is not timed

    def __post_init__(self) -> None:
        at_least("every", self.every, 1)
        at_least("warmup", self.warmup, 0)


class Draws:
    """`runs` draws the kinds of steps ahead; told what the steps took, it times fewer of them."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.beside = deque[float](maxlen=BESIDE)
        self.ratios = deque[float](maxlen=JUDGED)
        self.changes_s = deque[float](maxlen=2 * JUDGED)
        self.timed = 0

    def runs(self) -> Iterator[tuple[str, int]]:
        """Kinds, and how many steps in a row are of each: only whole steps are ever more than one."""
        yield from [(WARMUP, 1)] * self.sampling.warmup
        yield from [(COUNTED, 1)] * self.sampling.count_flops
        draw = random.Random(0)  # not of the training's random state
        while True:
            every = self.interval()
            drawn = draw.randrange(every)
            runs = ((WHOLE, drawn), (TIMED, 1), (WHOLE, every - drawn - 1))
            yield from ((kind, steps) for kind, steps in runs if steps)

    def took(self, kind: str, seconds: float) -> None:
        if kind == WHOLE:
            self.beside.append(seconds)
        elif kind == TIMED:
            self.timed += 1
            if self.beside and (usual := median(self.beside)):
                self.ratios.append(seconds / usual)

    def changed(self, kind: str, seconds: float) -> None:
        """What it took to go over to steps of a kind."""
        if kind in (TIMED, WHOLE):
            self.changes_s.append(seconds)

    def interval(self) -> int:
        """Of so many steps one is timed, as far as is known what it costs."""
        every = self.sampling.every
        if every > 1 and self.timed >= ENOUGH:
            every *= RARER
        return max(every, ceil(self.cost() / BOUND))

    def cost(self) -> float:
        """Of timing a step by phase, as a share of the step; 0 until enough were timed."""
        if len(self.ratios) < FEWEST:
            return 0.0
        there_and_back_s = 2 * median(self.changes_s) if self.changes_s else 0.0
        return median(self.ratios) - 1.0 + there_and_back_s / median(self.beside)
