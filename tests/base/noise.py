"""Times of a bad machine, simulated: what the rates stated by isoforward.base.statistics are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isoforward.base.statistics import LOOKS, Judgement, Look, judge, ratio

Array = np.ndarray[Any, np.dtype[np.float64]]
Noise = Callable[[np.random.Generator, int], Array]

SLOT = 0.065 / np.sqrt(2)  # so that the log ratio of a pair has the 6.5 % measured on a shared machine of 2 cores


def log_normal(draw: np.random.Generator, n: int) -> Array:
    return np.exp(draw.normal(0, SLOT, n))


def bursts(draw: np.random.Generator, n: int) -> Array:
    """One time in twenty is three times as long."""
    return log_normal(draw, n) * np.where(draw.random(n) < 0.05, 3.0, 1.0)


def drift(draw: np.random.Generator, n: int) -> Array:
    """A fifth slower at the end than at the start."""
    return log_normal(draw, n) * np.linspace(1.0, 1.2, n)


def two_modes(draw: np.random.Generator, n: int) -> Array:
    """Three times in ten on the slow placement, a third slower."""
    return log_normal(draw, n) * np.where(draw.random(n) < 0.3, 1.33, 1.0)


def autocorrelated(draw: np.random.Generator, n: int, keeps: float = 0.6) -> Array:
    """AR(1): each log time keeps 0.6 of the one before."""
    steps = draw.normal(0, SLOT, n)
    steps[1:] *= np.sqrt(1 - keeps**2)
    logs = np.empty(n)
    last = 0.0
    for i, step in enumerate(steps.tolist()):
        last = keeps * last + step
        logs[i] = last
    return np.exp(logs)


NOISES: dict[str, Noise] = {
    "log-normal": log_normal,
    "bursts": bursts,
    "drift": drift,
    "two modes": two_modes,
    "autocorrelated": autocorrelated,
}
# Of all the times together, from their distribution functions.
MEDIANS = {"log-normal": 1.0, "bursts": 1.00304, "drift": 1.0991, "two modes": 1.02635, "autocorrelated": 1.0}


def pairs(noise: Noise, draw: np.random.Generator, n: int, *, effect: float = 1.0) -> tuple[Array, Array]:
    """Times of A, `effect` times those of B, in pairs whose order is drawn; the second place is 3 % faster."""
    times = noise(draw, 2 * n).reshape(n, 2)
    times[:, 1] *= 0.97
    a_first = draw.random(n) < 0.5
    a, b = np.where(a_first, times[:, 0], times[:, 1]), np.where(a_first, times[:, 1], times[:, 0])
    return a * effect, b


def compared(a: Array, b: Array, looks: tuple[Look, ...] = LOOKS) -> tuple[Judgement, int]:
    """The judgement at the first look that settles it, else at the last, and the pairs it took."""
    for look in looks:
        n = round(look.share * len(a))
        judgement = judge(ratio(a[:n], b[:n], look=look))
        if judgement.settled:
            break
    return judgement, n
