"""Null distributions of the rank tests, and Student's t: NumPy has none of them, and SciPy is no dependency.

A test is inverted by sorting candidates for the parameter, such that the test statistic of a value just at a candidate
is the candidate's rank. A `*_cut` says how many to leave out at each end for an error of `alpha`, at least none, and
the error that this leaves; at few samples it is above `alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

EXACT_PAIRS = 200  # above, the signed-rank statistic is taken for normal
WALSH_PAIRS = 400  # above, Walsh averages are counted, not held: there are n^2 / 2


@cache
def binomial_cut(n: int, alpha: float) -> tuple[int, float]:
    """Of the samples, for their median: the sign test."""
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(n + 1)]
    return _cut(np.exp(logs), alpha)


@cache
def signed_rank_cut(n: int, alpha: float) -> tuple[int, float]:
    """Of the Walsh averages, for the centre of symmetry: Wilcoxon's test. The normal is corrected for continuity."""
    if n > EXACT_PAIRS:
        sd = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return math.floor(n * (n + 1) / 4 + NormalDist().inv_cdf(alpha / 2) * sd - 0.5), alpha
    chances = np.ones(1)  # of each sum of ranks, every rank in it by a fair coin
    for rank in range(1, n + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return _cut(chances, alpha)


@cache
def kendall_cut(n: int, alpha: float) -> tuple[int, float]:
    """Of the slopes between every two of n points, for the trend: the number of inversions in a random order."""
    chances = np.ones(1)
    for size in range(2, n + 1):
        chances = np.convolve(chances, np.full(size, 1 / size))
    return _cut(chances, alpha)


def _cut(chances: Array, alpha: float) -> tuple[int, float]:
    below = np.cumsum(chances)
    k = max(int(np.searchsorted(below, alpha / 2 * (1 + 1e-12), side="right")) - 1, 0)
    return k, float(2 * below[k])


def walsh(values: Array, weights: Array, ranks: Sequence[int]) -> list[float]:
    """The averages (v[i] + v[j]) / (w[i] + w[j]) of every two and of each with itself, at these ranks from 0."""
    n = len(values)
    if n <= WALSH_PAIRS:
        half = _lower_triangle(n)
        averages = ((values[:, None] + values) / (weights[:, None] + weights))[half]
        return [float(average) for average in np.partition(averages, ranks)[list(ranks)]]
    found = []
    alone = values / weights
    for rank in ranks:  # bisect on how many averages lie at or below: n log n a step
        low, high = float(alone.min()), float(alone.max())
        while low < (middle := (low + high) / 2) < high:
            above = np.sort(values - middle * weights)
            twice = int(np.searchsorted(above, -above, side="right").sum())
            once = int(np.searchsorted(above, 0, side="right"))
            low, high = (low, middle) if (twice + once) // 2 > rank else (middle, high)
        found.append(high)
    return found


@cache
def _lower_triangle(n: int) -> npt.NDArray[np.bool_]:
    return np.tri(n, dtype=np.bool_)


@cache
def student(probability: float, dof: int) -> float:
    """Quantile of Student's t, at 0.5 or more: Abramowitz and Stegun 26.7.3 and 26.7.4, by bisection."""

    def central(t: float) -> float:  # P(-t < T < t)
        angle, odd = math.atan(t / math.sqrt(dof)), dof % 2
        term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
        for step in range(1 + odd, dof, 2):
            total += term
            term *= math.cos(angle) ** 2 * step / (step + 1)
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, 1.0
    while central(high) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < 2 * probability - 1 else (low, middle)
    return high
