"""What W&B shows of rows: a table, summary metrics, and custom charts that a run logs with their points."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from isoforward.base.errors import BadInput
from isoforward.base.results import Results, select
from isoforward.base.vocabulary import LIVES
from isoforward.show.compare import cache_curve, compare, memory_ledger

Points = list[list[str | float]]

JOB_TYPES = ("train", "inference", "experiment")
COLUMNS = (
    *("experiment", "life", "phase", "quantity", "unit", "per", "value", "low", "high"),
    *("interval", "confidence", "provenance", "convention", "reason", "warnings", "conditions", "environment"),
)


def table(results: Results) -> list[list[str | float | None]]:
    return [
        [
            *(row.experiment, row.life, row.phase, row.quantity, row.unit, row.per, row.value, row.low, row.high),
            *(row.interval, row.confidence, row.provenance, row.convention, row.reason, "; ".join(row.warnings)),
            *(json.dumps(dict(row.conditions), sort_keys=True), row.environment),
        ]
        for row in results.rows
    ]


def summary(results: Results) -> dict[str, float | bool]:
    """`phase/forward/time_s`, `training/time_ratio`, ...; no ratios where the two lives cannot be compared."""
    figures: dict[str, float | bool | None] = {}
    if results.verdicts:
        figures["trusted"] = all(verdict.trusted for verdict in results.verdicts)
    try:
        found = compare(results)
    except BadInput:
        return {name: value for name, value in figures.items() if value is not None}
    figures |= {
        "training/time_ratio": found.time_ratio.value,
        "training/flops_ratio": found.flops_ratio,
        "training/memory_ratio": found.memory_ratio,
        "training/residual_share": found.residual,
        "inference/decode_ratio": found.decode_ratio,
    }
    for line in (*found.training, found.step, *found.inference):
        name = "frozen_forward" if (line.life, line.phase) == ("inference", "forward") else line.phase
        figures |= {
            f"phase/{name}/time_s": line.time.value if line.time else None,
            f"phase/{name}/time_per_token_s": line.time_per_token_s,
            f"phase/{name}/tokens_per_s": line.tokens_per_s,
            f"phase/{name}/flops": line.flops.value if line.flops else None,
            f"phase/{name}/flops_per_s": line.flops_per_s,
            f"phase/{name}/peak_bytes": line.memory.value if line.memory else None,
        }
    return {name: value for name, value in figures.items() if value is not None}


class Chart(NamedTuple):
    """A picture that a run logs with its points, and that the workspace shows for all runs: same key, same fields."""

    key: str
    title: str
    vega: str  # a chart that every W&B server knows
    columns: tuple[str, ...]
    points: Callable[[Results], Points]
    x_name: str | None = None

    @property
    def fields(self) -> dict[str, str]:
        names = ("label", "value") if self.vega == "wandb/bar/v0" else ("step", "lineKey", "lineVal")
        return dict(zip(names, self.columns, strict=True))

    @property
    def strings(self) -> dict[str, str]:
        return {"title": self.title} | ({"xname": self.x_name} if self.x_name else {})


def two_lives(results: Results) -> Points:
    try:
        found = compare(results)
    except BadInput:
        return []
    lines = [*found.training, *found.inference]
    return [
        [f"{line.life}: {line.phase}", line.time_per_token_s] for line in lines if line.time_per_token_s is not None
    ]


def ladder(results: Results) -> Points:
    rungs = [row for row in select(results, quantity="time", cold=None) if row.conditions.get("rung") is not None]
    return [[str(row.conditions["rung"]), row.value] for row in rungs if row.value is not None]


def ledger(results: Results) -> Points:
    return [[f"{life}: {category}", size] for life in LIVES for category, size in memory_ledger(results, life).items()]


def cache(results: Results) -> Points:
    return [
        [context, "KV cache" if cached else "no cache", row.value]
        for cached, curve in cache_curve(results).items()
        for context, row in curve
        if row.value is not None
    ]


def break_even(results: Results) -> Points:
    return [
        [row.conditions["served_tokens"], f"{row.life}, {row.unit}", row.value]  # type: ignore[list-item]
        for row in results.rows
        if row.conditions.get("served_tokens") is not None and row.value is not None
    ]


BAR, LINES = "wandb/bar/v0", "wandb/lineseries/v0"
CACHE, BREAK_EVEN = ("context", "cache", "time_s"), ("served_tokens", "life", "cost")
CHARTS = (
    Chart("two_lives", "time of one token by phase, both lives (s)", BAR, ("phase", "time_per_token_s"), two_lives),
    Chart("ladder", "what each rung from inference to training costs (s)", BAR, ("rung", "time_s"), ladder),
    Chart("ledger", "what fills the memory at its peak (bytes)", BAR, ("category", "bytes"), ledger),
    Chart("cache", "one more token, with a KV cache and without (s)", LINES, CACHE, cache, "tokens before it"),
    Chart("break_even", "when serving overtakes training", LINES, BREAK_EVEN, break_even, "tokens served"),
)
