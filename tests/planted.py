"""Rows whose truth is known, for what reads them."""

from __future__ import annotations

import random
from typing import Any

from isoforward.base.results import Comparison, Results, Row, Subject
from isoforward.base.statistics import judge, ratio, summarise
from isoforward.measure.passes import fields


def noisy(time_s: float, *, n: int = 12) -> list[float]:
    draw = random.Random(repr(time_s))
    return [time_s * draw.uniform(0.99, 1.01) for _ in range(n)]


def timed(
    life: str, phase: str, per: str, samples: list[float], *, experiment: str = "planted", **conditions: Any
) -> Row:
    about: dict[str, Any] = {"experiment": experiment, "life": life, "phase": phase, "per": per, "quantity": "time"}
    return Row(**about, **fields(summarise(samples)), conditions=conditions)


def compared(first: Row, second: Row, *, margin: float = 0.03) -> Comparison:
    """As the runner writes it, of samples that are pairs."""
    found = judge(ratio(first.samples, second.samples), margin=margin)
    subjects = (Subject(life=row.life, phase=row.phase, conditions=row.conditions) for row in (first, second))
    one, other = subjects
    interval = found.ratio.interval
    return Comparison(
        experiment=first.experiment,
        first=one,
        second=other,
        value=found.ratio.value,
        low=interval.low,
        high=interval.high,
        interval=interval.kind,
        confidence=interval.confidence,
        pairs=found.ratio.n,
        looks=1,
        margin=margin,
        outcome=found.outcome,
    )


def results_of(rows: list[Row], comparisons: list[Comparison] | None = None) -> Results:
    return Results(rows=tuple(rows), environments={}, verdicts=(), comparisons=tuple(comparisons or ()))
