"""Any rows as a picture: over a number that tells them apart, stacked as a ledger, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from isoforward.base import units
from isoforward.base.results import Row
from isoforward.show.charts import (
    PHASE_COLOURS,
    PURPOSE_COLOURS,
    Bar,
    Chart,
    Part,
    Record,
    bars,
    curves,
    dots,
    on_axis,
    printable,
)

ALIKE = {
    "parameters": "weights",
    "recomputed": "activations",
    "kernel buffers": "kernels",
    "kernel workspace": "kernels",
}
MOST_DOTS = 40
MOST_LINES = 12

HOW_OFTEN = "executions"  # of a sample: how it was measured, not what


def of_rows(name: str, rows: Sequence[Row], varying: Sequence[str]) -> Chart | None:
    """Rows of one quantity: over a number, if one tells them apart; stacked, if they are a ledger; else one by one."""
    rows = [row for row in rows if row.value is not None]
    if not rows:
        return None
    per = f"per {rows[0].per}"
    title = printable(f"{rows[0].quantity.replace('_', ' ').capitalize()} {per}")
    if held := accounted(rows):
        lanes: dict[str, list[Row]] = {}
        for row in held:
            rest = [key for key in varying if key != "category"]
            lanes.setdefault(labelled(row, rest, bare=len(rest) == 1), []).append(row)
        return ledgers(name, f"{title}, by what it is kept for", list(lanes.items()))
    numeric = [key for key in varying if all(is_number(row.conditions.get(key)) for row in rows)]
    x = next((key for key in numeric if len({row.conditions[key] for row in rows}) > 2), None)
    rest = [key for key in varying if key != x]
    lines = {(labelled(row, rest), None if x is None else row.conditions[x]) for row in rows}
    series = {label for label, _ in lines}
    if x is not None and len(lines) == len(rows) >= 3 * len(series) and len(series) <= MOST_LINES:
        marks = [mark(row, x=row.conditions[x], series=labelled(row, rest), variant=variant(row, rest)) for row in rows]
        spec = curves(marks, x_title=printable(x), unit=rows[0].unit, per=per)
        title = f"{title}, by {printable(x)}"
    else:
        alone = len({variant(row, varying) for row in rows}) == len(rows) > 1
        name_of = partial(variant, bare=True) if alone else labelled
        kinds = list(dict.fromkeys((row.life, row.phase) for row in rows))
        ordered = rows if alone else sorted(rows, key=lambda row: kinds.index((row.life, row.phase)))
        marks = [mark(row, series=name_of(row, varying)) for row in ordered]
        spec = dots(marks[:MOST_DOTS], unit=rows[0].unit, per=per)
        if len(marks) > MOST_DOTS:
            title = f"{title}: the first {MOST_DOTS} of {len(marks)}"
    return Chart(name=name, title=title, spec=spec, table=[])


def differing(rows: Sequence[Row]) -> list[str]:
    """The conditions that are not alike in all of them."""
    keys = dict.fromkeys(key for row in rows for key in row.conditions)
    return [key for key in keys if len({row.conditions.get(key) for row in rows}) > 1]


def telling(rows: Sequence[Row]) -> list[str]:
    """The conditions that tell `rows` apart, without those that follow from one of them or from the phase.

    From a number with a point that no two rows share, a measured time, all else would follow: it hides numbers only.
    """

    def values(key: str) -> set[object]:
        return {row.conditions.get(key) for row in rows}

    def numbers(key: str) -> bool:
        return all(is_number(row.conditions.get(key)) for row in rows)

    def follows(key: str, other: str) -> bool:
        measured = len(values(other)) == len(rows) and all(isinstance(value, float) for value in values(other))
        if measured and not numbers(key):
            return False
        return len({(row.conditions.get(other), row.conditions.get(key)) for row in rows}) == len(values(other))

    found: list[str] = []
    phases = {(row.life, row.phase) for row in rows}
    for key in sorted(differing(rows), key=lambda key: (-len(values(key)), not numbers(key))):
        by_phase = len({(row.life, row.phase, row.conditions.get(key)) for row in rows}) == len(phases)
        if key != HOW_OFTEN and not by_phase and not any(follows(key, other) for other in found):
            found.append(key)
    return found


def variant(row: Row, keys: Sequence[str], *, bare: bool = False) -> str:
    """The conditions that single it out, without their names where `bare` text can stand for itself."""
    told = ((key, row.conditions.get(key)) for key in keys)
    return ", ".join(
        printable(value if bare and isinstance(value, str) else f"{key}={value}", 60)
        for key, value in told
        if value is not None
    )


def labelled(row: Row, keys: Sequence[str], *, bare: bool = False) -> str:
    return ", ".join(filter(None, [f"{row.life} {row.phase}", variant(row, keys, bare=bare)]))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mark(row: Row, **at: object) -> Record:
    assert row.value is not None
    low, high = (row.value if end is None else end for end in (row.low, row.high))
    said = units.quantity(row.value, row.unit)
    return {
        "value": row.value,
        "low": low,
        "high": high,
        "phase": row.phase,
        "colour": PHASE_COLOURS[row.phase],
        "said": said,
        "told": f"{said} ({interval(row)}), {row.provenance}",
        **at,
    }


def interval(row: Row, divisor: float = 1.0) -> str:
    if row.low is None or row.high is None:
        return "no interval"
    return f"{units.quantity(row.low / divisor, row.unit)} to {units.quantity(row.high / divisor, row.unit)}"


def kind_of(interval: str, confidence: float | None) -> str:
    """How an interval was had, and how surely it holds; files written earlier do not tell the latter."""
    return interval + ("" if confidence is None else f", {confidence:.3g}")


def figures(row: Row, divisor: float = 1.0, unit: str | None = None) -> Record:
    def each(value: float | None) -> float | None:
        return None if value is None else value / divisor

    told: Record = {"value": each(row.value), "low": each(row.low), "high": each(row.high)}
    told |= {"interval": row.interval, "confidence": row.confidence}
    return told | {"unit": unit or row.unit, "provenance": row.provenance}


def ledgers(name: str, title: str, lanes: Sequence[tuple[str, Sequence[Row]]]) -> Chart:
    """Rows of one category each, stacked; the tick is the measured peak."""
    size, unit = on_axis("byte", max(whole(rows) for _, rows in lanes))
    purposes = [by_purpose(rows) for _, rows in lanes]
    drawn = []
    for (label, rows), kept in zip(lanes, purposes, strict=True):
        measured = next((row.value for row in rows if row.conditions["category"] == "measured peak"), None)
        parts = [
            Part(name=purpose, colour=PURPOSE_COLOURS[purpose], size=held / size, said=units.size(held))
            for purpose, held in kept.items()
        ]
        told = f"{units.size(whole(rows))} {'counted' if measured is None else 'measured'}"
        drawn.append(Bar(label=label, total=told, parts=parts, tick=None if measured is None else measured / size))
    return Chart(
        name=name,
        title=title,
        spec=bars(drawn, unit=unit, legend=[p for p in PURPOSE_COLOURS if any(p in kept for kept in purposes)]),
        table=[
            {"what": label, "category": row.conditions["category"]} | figures(row)
            for label, rows in lanes
            for row in rows
        ],
    )


def accounted(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.value is not None and isinstance(row.conditions.get("category"), str)]


def whole(rows: Sequence[Row]) -> float:
    """The measured peak, else the sum of what was counted."""
    held = {row.conditions["category"]: row.value or 0.0 for row in rows}
    return held.get("measured peak") or sum(held.values())


def by_purpose(rows: Sequence[Row]) -> dict[str, float]:
    """`activations.attention` and its like as activations, and what has no colour of its own as other."""
    kept = dict.fromkeys(PURPOSE_COLOURS, 0.0)
    for row in rows:
        category = str(row.conditions["category"]).partition(".")[0]
        purpose = ALIKE.get(category, category)
        if category != "measured peak" and row.value is not None and row.value > 0:
            kept[purpose if purpose in kept else "other"] += row.value
    return {purpose: size for purpose, size in kept.items() if size}
