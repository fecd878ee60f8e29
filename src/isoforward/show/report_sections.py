"""What a report shows of rows beside its pictures: numbers with their origin, tables, and the CSV behind each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from urllib.parse import quote

from isoforward.base import units
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, select
from isoforward.base.statistics import Judgement
from isoforward.show import phase_charts, ratio_charts, row_charts, step_charts
from isoforward.show.charts import Chart, Record, printable
from isoforward.show.compare import BothLives, Line, compare

PEAKS = ("peak_flops", "peak_bandwidth")  # of the machine, not of an experiment
EXECUTIONS = {"step": "a step", "sequence": "a prompt", "token": "a token", "run": ""}

Runs = Sequence[tuple[str, Results]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    below: str = ""
    phase: str = ""  # shown by its colour
    origin: str = ""  # of a number: its provenance
    hint: str = ""
    doubt: bool = False
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A row of a single cell is the heading of those below it."""

    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    @cached_property
    def numeric(self) -> set[int]:
        cells = [(n, cell) for row in self.rows if len(row) > 1 for n, cell in enumerate(row)]
        return {n for n, cell in cells if n and (cell.origin or re.match(r"[-+]?\d", cell.text))}


@dataclass(frozen=True, kw_only=True)
class Download:
    name: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class Section:
    heading: str
    lede: str = ""
    chart: Chart | None = None
    table: Table | None = None
    csv: Download | None = None
    origins: tuple[Cell, ...] = ()  # of the numbers in its picture
    open: bool = False  # its table is what one came for


def experiments(results: Results) -> Iterable[tuple[str, Results, BothLives | str]]:
    """Each with its own rows, and the comparison of both lives; or why, having both, they are not compared."""
    for name in dict.fromkeys(row.experiment for row in results.rows if row.quantity not in PEAKS):
        part = of_experiment(results, name)
        try:
            yield name, part, compare(part)
        except BadInput as error:
            yield name, part, str(error) if len({row.life for row in part.rows}) > 1 else ""


def of_experiment(results: Results, name: str) -> Results:
    return replace(
        results,
        rows=tuple(row for row in results.rows if row.experiment == name or row.quantity in PEAKS),
        verdicts=tuple(verdict for verdict in results.verdicts if verdict.experiment == name),
    )


def comparison_of(results: Results) -> BothLives | None:
    return next((found for *_, found in experiments(results) if isinstance(found, BothLives)), None)


def doubts(results: Results) -> dict[str, str]:
    """By experiment, why its numbers are not to be trusted too far."""
    doubted = {verdict.experiment for verdict in results.verdicts if not verdict.trusted}
    return {name: "; ".join(of_experiment(results, name).doubts) for name in doubted}


def figure(row: Row | None, doubted: Mapping[str, str], divisor: float = 1.0) -> Cell:
    if row is None or row.value is None:
        reason = "no row tells it" if row is None else row.reason or ""
        return Cell(text="unavailable", origin="unavailable", hint=printable(reason))
    judged = row.provenance == "measured" and row.quantity != "memory"  # a busy machine holds as much as an idle one
    reasons = [*row.warnings, *filter(None, [doubted.get(row.experiment) if judged else None])]
    hint = [
        row.provenance + (f" in the {row.convention} convention" if row.convention else ""),
        f"median of {len(row.samples)} samples" if row.samples else "",
        f"interval: {row_charts.kind_of(row.interval, row.confidence)}" if row.interval else "",
        *reasons,
    ]
    return Cell(
        text=units.quantity(row.value / divisor, row.unit),
        below="" if row.low is None else row_charts.interval(row, divisor),
        origin=row.provenance,
        hint=printable("; ".join(filter(None, hint))),
        doubt=bool(reasons),
    )


# Both lives


def both_lives(run: BothLives) -> list[Section]:
    doubted = "; ".join(run.warnings)
    return [
        pictured("Where the time of a token goes", phase_charts.two_lives([("", run)]), doubted),
        Section(heading="Every phase", table=phase_table(run), csv=download("phases", phase_records(run)), open=True),
        pictured("Where the memory goes", phase_charts.memory([("", run.results)])),
        pictured("What a KV cache is for", phase_charts.cache(run.results), doubted),
        pictured("When serving overtakes training", phase_charts.break_even(run), doubted),
        pictured("How near the machine's limits", phase_charts.roofline(run), doubted),
    ]


def pictured(heading: str, chart: Chart | str, doubted: str = "") -> Section:
    """A picture, with what it draws; or why there is none."""
    if isinstance(chart, str):
        return Section(heading=heading, lede=f"Unavailable: {chart}.")
    columns = [key.replace("_", " ") for key in chart.table[0]]
    rows = [[Cell(text=plain(value)) for value in record.values()] for record in chart.table]
    origins = dict.fromkeys(origin for record in chart.table for origin in record["provenance"].split(", "))
    return Section(
        heading=heading,
        lede=f"{chart.title}.",
        chart=chart,
        table=Table(columns=columns, rows=rows),
        csv=download(chart.name, chart.table),
        origins=tuple(told(origin, doubted if origin == "measured" else "") for origin in origins),
    )


def told(origin: str, doubted: str = "", *, text: str = "", below: str = "", hint: str = "") -> Cell:
    """A number that no single row holds, or several, with where they come from."""
    hint = hint or printable("; ".join(filter(None, [origin, doubted])))
    return Cell(text=text, below=below, origin=origin, hint=hint, doubt=bool(doubted))


def judged(found: Judgement, origin: str, doubted: str = "") -> Cell:
    """A ratio with its interval where it differs from 1; else that it does not, or that this is not known."""
    ratio, interval = found.ratio, found.ratio.interval
    ends = f"{units.times(ratio.low)} to {units.times(ratio.high)}"
    below = {"equal": f"equal within {found.margin:.0%}", "undecided": f"{found.told}, {ends}"}.get(found.outcome, ends)
    hint = [origin, found.told, f"interval: {row_charts.kind_of(interval.kind, interval.confidence)}", doubted]
    return told(origin, doubted, text=units.times(ratio.value), below=below, hint="; ".join(filter(None, hint)))


def phase_table(run: BothLives) -> Table:
    doubted = doubts(run.results)
    warned = "; ".join(run.warnings)

    def cells(line: Line) -> list[Cell]:
        strong = line is run.step
        per = EXECUTIONS[line.time.per] if line.time else ""
        against = Cell(text="")
        if line.against_forward is not None:
            against = judged(line.against_forward, "measured", warned)
        pace = figure(None, doubted)
        if line.time_per_token_s and line.tokens_per_s:
            pace = told(
                line.time.provenance if line.time else "measured",
                warned,
                text=units.seconds(line.time_per_token_s),
                below=f"{line.tokens_per_s:,.0f} a second",
            )
        flops = figure(line.flops, doubted)
        if strong:
            counted = sum(one.flops.value or 0.0 for one in run.training if one.flops)
            flops = told("counted", text=units.count(counted, "FLOP")) if counted else flops
        elif line.flops_per_s:
            flops = replace(flops, below=units.count(line.flops_per_s, "FLOP/s"))
        name = Cell(text=line.label, below=per, phase=line.phase, strong=strong)
        return [name, figure(line.time, doubted), against, pace, flops, figure(line.memory, doubted)]

    energy = [
        f"Energy of {'a training step' if row.life == 'training' else 'a generation'}: "
        + (
            f"unavailable ({row.reason})."
            if row.value is None
            else f"{units.quantity(row.value, row.unit)}, {row.provenance}."
        )
        for row in select(run.results, quantity="energy")
    ]
    return Table(
        columns=["phase", "time", "x frozen forward", "a token", "FLOPs", "peak memory"],
        rows=[
            [Cell(text=f"Training, a step of {run.step.tokens:,.0f} tokens")],
            *map(cells, [*run.training, run.step]),
            [Cell(text="Inference")],
            *map(cells, run.inference),
        ],
        note=" ".join([f"Phases and whole step, timed apart, differ by {run.residual:+.1%} of the step.", *energy]),
    )


def phase_records(run: BothLives) -> list[Record]:
    return [
        {"life": line.life, "phase": line.phase, "label": line.label, "tokens": line.tokens}
        | {f"time_{key}": value for key, value in (row_charts.figures(line.time) if line.time else {}).items()}
        | {"flops": line.flops and line.flops.value, "peak_bytes": line.memory and line.memory.value}
        for line in [*run.training, run.step, *run.inference]
    ]


# Any rows


def any_rows(experiment: str, results: Results, most: int) -> list[Section]:
    """What a setting changed, where one was; and a section for each quantity: its picture, and its table, of at most
    `most` rows in all.
    """
    doubted = doubts(results)
    groups: dict[tuple[str, str, str, str | None], list[Row]] = {}
    own = [row for row in results.rows if row.experiment == experiment]
    for row in own:
        groups.setdefault((row.quantity, row.unit, row.per, row.convention), []).append(row)
    if len(results.rows) > most:
        most = max(most // len(groups), 10)
    sections = []
    alone = replace(results, rows=tuple(own))
    change = ratio_charts.changes(experiment, alone)
    if picture := change or step_charts.steps(experiment, alone):
        heading = spoken(f"{experiment}: {'what changes' if change else 'steps'}")
        sections.append(pictured(heading, picture, doubted.get(experiment, "")))
    for (quantity, _, per, convention), rows in groups.items():
        varying = row_charts.telling(rows)
        told = "".join((f" per {per}", f", {convention} convention" if convention else ""))
        unlike = row_charts.differing(rows)
        shared = [f"{key}={value}" for key, value in rows[0].conditions.items() if key not in unlike]
        note = [f"All with {', '.join(shared)}." if shared else ""]
        note += [f"The first {most} of {len(rows)} rows; results.jsonl holds all." if len(rows) > most else ""]
        sections.append(
            Section(
                heading=spoken(f"{experiment}: {quantity}{told}"),
                chart=row_charts.of_rows(f"{experiment}_{quantity}_{per}_{convention or ''}", rows[:most], varying),
                table=Table(
                    columns=["life", "phase", *map(printable, varying), quantity],
                    rows=[
                        [Cell(text=row.life), Cell(text=row.phase, phase=row.phase)]
                        + [Cell(text=plain(row.conditions.get(key))) for key in varying]
                        + [figure(row, doubted)]
                        for row in rows[:most]
                    ],
                    note=printable(" ".join(filter(None, note)), 2000),
                ),
                csv=download(f"{experiment}_{quantity}", [record(row) for row in rows[:most]]),
                open=True,
            )
        )
    return sections


def every_row(results: Results, most: int) -> tuple[Table, Download]:
    doubted = doubts(results)
    shown = results.rows[:most]
    varying = set(row_charts.differing(shown))
    table = Table(
        columns=["experiment", "life", "phase", "quantity", "per", "value", "conditions"],
        rows=[
            [Cell(text=printable(text)) for text in (row.experiment, row.life, row.phase, row.quantity, row.per)]
            + [figure(row, doubted)]
            + [Cell(text=printable(", ".join(f"{k}={v}" for k, v in row.conditions.items() if k in varying)))]
            for row in shown
        ],
        note=f"The first {most} of {len(results.rows)}; results.jsonl holds all." if len(results.rows) > most else "",
    )
    return table, download("rows", [record(row) for row in shown])


def record(row: Row) -> Record:
    told: Record = {key: getattr(row, key) for key in ("experiment", "life", "phase", "quantity", "per")}
    rest = {"convention": row.convention, "reason": row.reason, "warnings": "; ".join(row.warnings) or None}
    return told | row_charts.figures(row) | rest | dict(row.conditions)


# Text


def spoken(name: str) -> str:
    """A name of the rows as a heading."""
    return printable(name.replace("_", " ").capitalize())


def plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


def download(name: str, records: Sequence[Mapping[str, object]]) -> Download:
    """As a link that holds the file. A spreadsheet must not take a stranger's text for a formula."""
    columns = list(dict.fromkeys(key for each in records for key in each))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")

    def harmless(value: object) -> object:
        text = printable(value) if isinstance(value, str) else value
        return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@")) else text

    writer.writerow({column: harmless(column) for column in columns})
    writer.writerows({key: harmless(value) for key, value in each.items()} for each in records)
    return Download(name=slug(name), uri=f"data:text/csv;charset=utf-8,{quote(file.getvalue(), safe=' ,;:()/')}")


def slug(name: str) -> str:
    """Fit to name a file, in the directory that it is put into."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:80] or "chart"
