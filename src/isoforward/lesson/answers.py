"""What a run's own rows answer: the lesson's ten questions, and the times and peaks of its pictures.

A question whose rows are not there, or not the only ones of their kind, is left out. None is answered by anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from isoforward.base.results import Results, Row, select
from isoforward.base.vocabulary import TRAINING
from isoforward.show.compare import cache_curve, memory_ledger

At = Mapping[str, int | None]  # where it was measured


class Interval(TypedDict):
    """None of what has none."""

    low: float | None
    high: float | None
    interval: str | None


class Answer(Interval):
    """Of one question."""

    name: str
    unit: str
    value: float
    provenance: str
    at: At


class Measured(TypedDict):
    questions: list[Answer]
    lanes: dict[str, dict[str, float]] | None  # seconds by life and phase
    memory: dict[str, float] | None  # peaks, bytes
    machine: str
    doubts: list[str]


def measured(results: Results | None) -> Measured:
    if results is None:
        return {"questions": [], "lanes": None, "memory": None, "machine": "", "doubts": []}
    return {
        "questions": [answer for answer in answers(results) if answer is not None],
        "lanes": lanes(results),
        "memory": peaks(results),
        "machine": machine(results),
        "doubts": results.doubts,
    }


def answers(results: Results) -> list[Answer | None]:
    step, forward, backward, optimizer = (
        row(results, "training", phase, "time") for phase in ("step", "forward", "backward", "optimizer")
    )
    frozen, frozen_peak = (row(results, "inference", "forward", quantity) for quantity in ("time", "memory"))
    decode = row(results, "inference", "decode", "time", context=None)
    step_flops = [row(results, "training", phase, "flops", convention="model") for phase in TRAINING]
    context, cached, uncached = longest(results)
    flops = {
        kept: row(results, "inference", "decode", "flops", convention="model", context=context, cache=kept)
        for kept in (True, False)
    }
    at = {"context": context}
    return [
        compared(results, "step_time", step, frozen),
        quotient("step_flops", total(step_flops), value_of(step_flops[0]), "counted"),
        compared(results, "backward_time", backward, forward),
        compared(results, "forward_twice", forward, frozen),
        quotient("step_memory", training_peak(results), value_of(frozen_peak), "measured"),
        quotient("activations", kept_for_backward(results), training_peak(results), "measured", unit="%"),
        compared(results, "optimizer", optimizer, step, unit="%"),
        compared(results, "decode", decode, step, tokens=tokens_of(step)),
        compared(results, "cache_time", uncached, cached, at=at),
        quotient("cache_flops", value_of(flops[False]), value_of(flops[True]), "counted", at=at),
    ]


def row(results: Results, life: str, phase: str, quantity: str, **more: object) -> Row | None:
    """The only warm row of its kind; None where there is none, or several that could be meant."""
    wanted: dict[str, object] = {"context": None, "category": None, "cold": None} | more
    found = [
        each
        for each in select(results, life=life, phase=phase, quantity=quantity, **wanted)
        if each.value is not None and each.value >= 0
    ]
    return found[0] if len(found) == 1 else None


def value_of(found: Row | None) -> float | None:
    return None if found is None else found.value


def total(rows: Sequence[Row | None]) -> float | None:
    values = [value_of(each) for each in rows]
    return None if None in values else sum(value or 0.0 for value in values)


def tokens_of(step: Row | None) -> float | None:
    tokens = None if step is None else step.conditions.get("tokens")
    return float(tokens) if isinstance(tokens, int) and tokens > 0 else None


def compared(
    results: Results,
    name: str,
    first: Row | None,
    second: Row | None,
    *,
    unit: str = "x",
    tokens: float | None = 1.0,
    at: At | None = None,
) -> Answer | None:
    """A ratio of times with its interval, of one token of the second, which takes `tokens` at a time."""
    if first is None or second is None or not tokens or not (first.samples and second.samples):
        return None
    found = results.judge(first, second).ratio
    interval = f"{found.interval.kind}, {found.interval.confidence:.0%}, n = {found.n}"
    ends: Interval = {"low": found.low * tokens, "high": found.high * tokens, "interval": interval}
    return {"name": name, "unit": unit, "value": found.value * tokens, **ends, "provenance": "measured", "at": at or {}}


def quotient(
    name: str, first: float | None, second: float | None, provenance: str, at: At | None = None, unit: str = "x"
) -> Answer | None:
    """Of two single numbers, so that there is no interval."""
    if not first or not second:
        return None
    none: Interval = {"low": None, "high": None, "interval": None}
    return {"name": name, "unit": unit, "value": first / second, **none, "provenance": provenance, "at": at or {}}


def training_peak(results: Results) -> float | None:
    values = [value_of(row(results, "training", phase, "memory")) for phase in TRAINING]
    return max((value for value in values if value is not None), default=None)


def kept_for_backward(results: Results) -> float | None:
    ledger = memory_ledger(results, "training")
    kept = [size for category, size in ledger.items() if category.startswith(("activations", "logits and loss"))]
    return sum(kept) or None


def longest(results: Results) -> tuple[int | None, Row | None, Row | None]:
    """One more token at the longest past that was measured both ways: that past, the cached row, the other."""
    curve = {kept: dict(points) for kept, points in cache_curve(results).items()}
    context = max(curve[True].keys() & curve[False].keys(), default=None)
    if context is None:
        return None, None, None
    return context, curve[True][context], curve[False][context]


def lanes(results: Results) -> dict[str, dict[str, float]] | None:
    """Seconds of each phase of a training step, and of the frozen forward on the same batch; all of them, or None."""
    training = {phase: value_of(row(results, "training", phase, "time")) for phase in TRAINING}
    frozen = value_of(row(results, "inference", "forward", "time"))
    times = {phase: value for phase, value in training.items() if value}
    return {"training": times, "inference": {"forward": frozen}} if frozen and len(times) == len(TRAINING) else None


def peaks(results: Results) -> dict[str, float] | None:
    serving = [value_of(row(results, "inference", phase, "memory")) for phase in ("prefill", "decode")]
    training, served = training_peak(results), max((value for value in serving if value), default=None)
    return {"training": training, "serving": served} if training and served else None


def machine(results: Results) -> str:
    for environment in results.environments.values():
        told = environment.identity
        threads = told.get("threads")
        return str(told.get("gpu") or f"{told.get('cpu')}, {threads} {'thread' if threads == 1 else 'threads'}")
    return ""
