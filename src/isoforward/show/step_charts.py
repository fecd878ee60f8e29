"""Whole steps as bars of their phases, one for each setting that was timed."""

from __future__ import annotations

from isoforward.base import units
from isoforward.base.results import Results, Row
from isoforward.base.vocabulary import WHOLES
from isoforward.show.charts import PHASE_COLOURS, Bar, Chart, Part, bars, on_axis, printable
from isoforward.show.row_charts import figures, interval, telling, variant

FEWEST_PHASES = 3  # of a bar
MOST_BARS = 12
UNNAMED = "the plain step"


def steps(name: str, results: Results) -> Chart | None:
    """Of rows that time the phases of a step in two settings or more, which a name tells apart, or of steps that hold
    both lives; else None.
    """
    settings: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.quantity == "time" and row.per == "step" and row.phase not in (*WHOLES, "residual") and row.value:
            settings.setdefault(repr(sorted(row.conditions.items())), []).append(row)
    lived = [rows for rows in settings.values() if len({row.phase for row in rows}) >= FEWEST_PHASES]
    keys = telling([row for rows in lived for row in rows])
    named = len(keys) == 1 and all(isinstance(row.conditions.get(keys[0]), str) for rows in lived for row in rows)
    both = any(len({row.life for row in rows}) > 1 for rows in lived)
    lanes = {variant(rows[0], keys, bare=True) or UNNAMED: rows for rows in lived}
    if not (named or both) or not 2 <= len(lanes) <= MOST_BARS or len(lanes) < len(lived):
        return None
    wholes = {label: sum(row.value or 0.0 for row in held) for label, held in lanes.items()}
    size, unit = on_axis("s", sorted(wholes.values())[len(wholes) // 2])

    def part(row: Row) -> Part:
        said = f"{units.seconds(row.value or 0.0)} ({interval(row)})"
        return Part(name=row.phase, colour=PHASE_COLOURS[row.phase], size=(row.value or 0.0) / size, said=said)

    drawn = [
        Bar(label=printable(label, 80), total=units.seconds(wholes[label]), parts=[part(row) for row in held])
        for label, held in lanes.items()
    ]
    phases = list(dict.fromkeys(row.phase for held in lanes.values() for row in held))
    return Chart(
        name=f"{name}_steps",
        title="Time of a step, by its phases",
        spec=bars(drawn, unit=f"{unit} per step", legend=phases),
        table=[
            {"what": label, "life": row.life, "phase": row.phase} | figures(row)
            for label, held in lanes.items()
            for row in held
        ],
    )
