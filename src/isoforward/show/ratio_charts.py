"""What a setting changes: the time of every phase in one setting, as a multiple of that in another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from isoforward.base import units
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row
from isoforward.base.statistics import Judgement
from isoforward.show.charts import PHASE_COLOURS, Chart, Record, dots, printable
from isoforward.show.row_charts import is_number, labelled, telling

PARTS = ("layer",)  # of a whole: they are no settings of it
MOST_SETTINGS = 5
MOST_LANES = 24


@dataclass(frozen=True, kw_only=True)
class Change:
    row: Row
    kind: str  # of setting
    places: Sequence[str]  # other conditions that tell rows of its phase apart
    found: Judgement


def changes(name: str, results: Results) -> Chart | None:
    """Of rows timed in settings of one kind, in two phases or more; else None."""
    timed = [row for row in results.rows if row.quantity == "time" and len(row.samples) > 1]
    found = list(changed(results, timed))
    kinds = {change.kind for change in found}
    phases = {(change.row.life, change.row.phase) for change in found}
    if len(kinds) != 1 or kinds & set(PARTS) or len(phases) < 2 or len(found) > MOST_LANES:
        return None
    (kind,) = kinds
    settings = list(dict.fromkeys(row.conditions[kind] for row in timed if kind in row.conditions))
    if len(settings) > MOST_SETTINGS:
        return None
    first, *others = (printable(f"{kind}={setting}") for setting in settings)
    title = f"Time with {others[0]}, against {first}" if len(others) == 1 else f"Time, against {first}"
    marks = [mark(change, named=len(others) > 1) for change in found]
    spec = dots(marks, unit="", per=f"x the time with {first}", ratios=True)
    return Chart(name=f"{name}_against", title=title, spec=spec, table=[record(change) for change in found])


def changed(results: Results, rows: Sequence[Row]) -> Iterator[Change]:
    """Each row against that of the same phase and place in the first setting, where every place has every setting."""
    phases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        phases.setdefault((row.life, row.phase), []).append(row)
    for group in phases.values():
        told = telling(group)
        places = [key for key in told if all(is_number(row.conditions.get(key)) for row in group)]
        kinds = [key for key in told if key not in places]
        if len(kinds) != 1 or len(places) > 1:
            continue
        settings = {row.conditions.get(kinds[0]) for row in group}
        shared: dict[tuple[object, ...], list[Row]] = {}
        for row in group:
            shared.setdefault(tuple(row.conditions[key] for key in places), []).append(row)
        if any(len(beside) != len(settings) for beside in shared.values()):
            continue
        for _, (base, *others) in sorted(shared.items(), key=lambda place: place[0]):
            for row in others:
                try:
                    found = results.judge(row, base)
                except BadInput:  # too few samples, a difference that may be negative, another machine
                    continue
                yield Change(row=row, kind=kinds[0], places=places, found=found)


def mark(change: Change, *, named: bool) -> Record:
    phase, ratio = labelled(change.row, change.places), change.found.ratio
    own: Record = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "said": units.times(ratio.value)}
    return own | {
        "series": f"{phase}, {printable(str(change.row.conditions.get(change.kind)))}" if named else phase,
        "phase": change.row.phase,
        "colour": PHASE_COLOURS[change.row.phase],
        "told": (f"{change.found.outcome}: " if change.found.differs else "") + change.found.sentence(),
    }


def record(change: Change) -> Record:
    row, ratio = change.row, change.found.ratio
    where = {key: row.conditions.get(key) for key in (change.kind, *change.places)}
    told: Record = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "pairs": ratio.n}
    told |= {"interval": ratio.interval.kind, "confidence": ratio.interval.confidence}
    about: Record = {"life": row.life, "phase": row.phase, **where}
    return about | told | {"outcome": change.found.outcome, "provenance": "measured"}
