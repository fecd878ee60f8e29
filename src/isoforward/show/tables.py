"""The comparison as a terminal shows it, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isoforward.base import units
from isoforward.base.results import Results, Row
from isoforward.base.statistics import Judgement
from isoforward.base.vocabulary import CONDITIONS, Condition
from isoforward.show.compare import BothLives, Line, cache_curve
from isoforward.show.row_charts import differing, kind_of

MOST_ROWS = 24  # of one quantity; the report has them all
ASIDE = ("tokens", "executions", "parameters", "peak_phase", "head")  # conditions that follow from others
READINGS = ("training_time_s", "training_gflop")  # no two are alike, and none says what a row is of


def show_rows(console: Console, results: Results) -> None:
    """Any rows, a table for each quantity: in front what tells its rows apart, above them all what they share."""
    rows = [row for row in results.rows if row.quantity != "identity"]
    apart = differing(rows)
    common = [f"{key} {value}" for key, value in shared(rows).items() if key not in (*apart, *ASIDE)]
    console.print(", ".join(common), style="dim", markup=False, highlight=False)
    for quantity in dict.fromkeys(row.quantity for row in rows):
        console.print(of_quantity(quantity, [row for row in rows if row.quantity == quantity]))
    explain_intervals(console, rows)
    verdicts(console, results)


def explain_intervals(console: Console, rows: Sequence[Row]) -> None:
    kinds = dict.fromkeys(kind_of(row.interval, row.confidence) for row in rows if row.interval)
    if kinds:
        console.print(f"± half the interval: {'; '.join(kinds)}", style="dim", markup=False, highlight=False)


def of_quantity(quantity: str, rows: list[Row]) -> Table:
    varying = fewest(rows)
    lives, pers = (len(set(which)) > 1 for which in ([row.life for row in rows], [row.per for row in rows]))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in varying:  # alone may they take two lines
        table.add_column(name.replace("_", " "), overflow="ellipsis")
    for name in (*(["life"] if lives else []), "phase", *(["per"] if pers else [])):
        table.add_column(name, no_wrap=True)
    known = quantity == "time" or any(map(spread, rows[:MOST_ROWS]))
    for name in (quantity, *(["±"] if known else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:MOST_ROWS]:
        where = [plain(row.conditions.get(key)) for key in varying] + ([row.life] if lives else [])
        per = [row.per] if pers else []
        table.add_row(*where, row.phase, *per, units.quantity(row.value, row.unit), *([spread(row)] if known else []))
    if len(rows) > MOST_ROWS:
        table.caption = f"and {len(rows) - MOST_ROWS} more, in the report"
    return table


def fewest(rows: list[Row]) -> list[str]:
    """The fewest conditions that tell rows of one phase apart, and readings after them.

    Where some would do as well, those declared last.
    """
    unlike = differing(rows)

    def apart(keys: list[str]) -> int:
        return len({(row.life, row.phase, row.per, *(row.conditions.get(key) for key in keys)) for row in rows})

    kept = [key for key in unlike if key not in (*ASIDE, *READINGS)]
    for key in [key for key in CONDITIONS if key in kept]:
        fewer = [each for each in kept if each != key]
        if apart(fewer) == apart(kept):
            kept = fewer
    return kept + [key for key in unlike if key in READINGS]


def plain_table(*columns: str, left: Sequence[str] = ("phase",)) -> Table:
    """Numbers on the right, and what is `left` on the left."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in left else "right")
    return table


def shared(rows: list[Row]) -> dict[str, Condition]:
    """What all rows have alike."""
    first = rows[0].conditions if rows else {}
    return {key: first[key] for key in first if all(row.conditions.get(key) == first[key] for row in rows)}


def plain(value: Condition) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spread(row: Row) -> str:
    """Half the interval, relative to the value."""
    if row.low is None or row.high is None or not row.value:
        return ""
    return f"{(row.high - row.low) / 2 / abs(row.value):.0%}"


def verdicts(console: Console, results: Results) -> None:
    trust(console, results.doubts)


def trust(console: Console, warnings: list[str]) -> None:
    verdict = "[green]these numbers can be trusted[/]"
    if warnings:
        verdict = "[yellow]take these numbers with care:[/] " + escape("; ".join(warnings))
    console.print(verdict, highlight=False)


def show(console: Console, comparison: BothLives) -> None:
    where = comparison.conditions
    console.print(
        f"[bold]What does training add to the forward pass, and what does serving cost?[/]\n"
        f"{where['parameters']:,} parameters, {where['dtype']}; "
        f"training on {where['batch']} x {where['length']} tokens, serving one sequence",
        highlight=False,
    )
    table = plain_table("phase", "time", "±", "x forward", "a token", "FLOP", "peak")
    table.add_row("[bold]training[/], a step")
    for one in [*comparison.training, comparison.step]:
        table.add_row(*cells(one))
    table.add_row("[bold]inference[/]")
    for one in comparison.inference:
        table.add_row(*cells(one))
    console.print(table)
    explain_intervals(console, [one.time for one in (*comparison.training, *comparison.inference) if one.time])
    console.print(f"phases and whole step differ by {comparison.residual:+.1%}", style="dim", highlight=False)
    curve = cache_curve(comparison.results)
    if len(curve[True]) > 1 and len(curve[False]) > 1:
        ends = [
            f"{'with' if cache else 'without'} KV cache {spoken(points[0])} -> {spoken(points[-1])}"
            for cache, points in curve.items()
        ]
        console.print(f"one more token: {'; '.join(ends)}", highlight=False)
    trust(console, comparison.warnings)
    console.print(f"\n[bold]{escape(comparison.headline)}[/]\n", highlight=False)


def spoken(point: tuple[int, Row]) -> str:
    context, row = point
    return f"{units.seconds(row.value or 0.0)} at {context}"


def against_forward(found: Judgement) -> str:
    return units.times(found.ratio.value) if found.differs else found.told


def cells(one: Line) -> list[str]:
    time = one.time
    if time is None or time.value is None:
        return [f"  {one.label}", "unavailable"]
    whole, *rest = one.costs
    against = "" if one.against_forward is None else against_forward(one.against_forward)
    return [f"  {one.label}", whole, spread(time), against, *rest]
