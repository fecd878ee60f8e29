"""Which share of its data sheet a device reaches, and how far such a guess is off: from what others published.

A share is never 1. It is the median over sources of what they measured on that device, or, where none is known, on all
devices. Each published speed is predicted from the other sources alone. The errors of these predictions, every
source counting the same, are the uncertainty that a plan states for hardware that was not calibrated here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import median

from isoforward.base.datasheets import TABLE
from isoforward.model import cost, footprint
from isoforward.plan.published import MODELS, Published, published

COVERED = 0.90  # of the published speeds lie in the interval
WORKS = ("training", "prefill", "decode", "decode on several")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Of a peak. A time predicted with it lies, for nine of ten published ones, between `low` and `high` times it."""

    value: float
    low: float
    high: float
    known: bool  # whether others measured on this very device
    measurements: int  # that the interval rests upon


@cache
def alike(work: str) -> tuple[Published, ...]:
    """What was measured of such work. Products fill a device in a prompt as in training: they are looked at together.
    Sharing one decode between devices makes them wait for one another, and is a work of its own.
    """
    kinds = ("training", "prefill") if work in ("training", "prefill") else ("decode",)
    found = [one for one in published() if one.kind in kinds]
    if work.startswith("decode"):
        found = [one for one in found if (one.devices > 1) == (work != "decode")]
    return tuple(found)


@cache
def reached(one: Published) -> float:
    """The share of the peak: of FLOP/s with what was recomputed, or of the bandwidth of all devices together."""
    model, hardware = MODELS[one.model], TABLE[one.hardware]
    if one.kind == "decode":
        moved = footprint.inference_bytes(model, batch=one.batch, cached=one.length, dtype=one.dtype).total
        return one.tokens_per_s / one.batch * moved / (hardware.bandwidth_bytes_per_s * one.devices)
    flops = cost.forward_flops(model, batch=1, length=one.length, logits="all" if one.kind == "training" else "last")
    if one.kind == "training":
        flops += cost.backward_flops(
            model, batch=1, length=one.length, convention="hardware", checkpointing=one.checkpointing
        )
    return one.tokens_per_s * flops.total / one.length / hardware.peak_flops_per_s[one.dtype]


def usual(measured: Iterable[Published], hardware: str | None) -> float:
    """The median over sources, so that a long table counts no more than a short one."""
    measured = list(measured)
    by_source: dict[str, list[float]] = {}
    for one in [one for one in measured if one.hardware == hardware] or measured:
        by_source.setdefault(one.source, []).append(reached(one))
    return median(median(shares) for shares in by_source.values())


@cache
def errors(work: str) -> tuple[tuple[float, float], ...]:
    """Of each published time: it, over what the other sources let expect; and its weight, the same for each source.

    1 is exact, 2 took twice as long.
    """
    measured = alike(work)
    rows = Counter(one.source for one in measured)
    told = []
    for one in measured:
        others = [each for each in measured if each.source != one.source]
        told.append((usual(others, one.hardware) / reached(one), 1 / rows[one.source] / len(rows)))
    return tuple(sorted(told))


def quantile(work: str, wanted: float) -> float:
    """The smallest error that a share `wanted` of the published speeds do not exceed."""
    below = 0.0
    for error, weight in errors(work):
        below += weight
        if below >= wanted - 1e-9:
            return error
    raise AssertionError("weights add up to 1")


@cache
def share(work: str, hardware: str | None) -> Share:
    """`hardware` is a key of the data sheets; None is a device that they do not have."""
    measured, tail = alike(work), (1 - COVERED) / 2
    return Share(
        value=usual(measured, hardware),
        low=min(quantile(work, tail), 1.0),
        high=max(quantile(work, 1 - tail), 1.0),
        known=any(one.hardware == hardware for one in measured),
        measurements=len(measured),
    )
