"""Several runs side by side: what differs between them, and every number of all, with ratios where they can be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from isoforward.base import units
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, refuse_unlike
from isoforward.base.statistics import judge, ratio_unpaired
from isoforward.show import phase_charts, row_charts
from isoforward.show.charts import printable
from isoforward.show.compare import BothLives
from isoforward.show.report_sections import (
    Cell,
    Runs,
    Section,
    Table,
    comparison_of,
    doubts,
    figure,
    judged,
    pictured,
    plain,
    told,
)


def side_by_side(runs: Runs, most: int) -> list[Section]:
    """What differs, then every number of all runs, with ratios to the first where the places they come from match."""
    refused = {name: refusal(runs[0][1], results) for name, results in runs[1:]}
    compared = [(name, found) for name, results in runs if (found := comparison_of(results))]
    sections = [Section(heading="What differs", lede=" ".join(unlike(refused)), table=differences(runs), open=True)]
    if len(compared) == len(runs):
        doubted = "; ".join(dict.fromkeys(warning for _, one in compared for warning in one.warnings))
        held = phase_charts.memory([(name, one.results) for name, one in compared])
        sections.append(pictured("Both lives of each run", phase_charts.two_lives(compared), doubted))
        sections.append(pictured("Memory of each run", held))
        entries = [of_lines(one) for _, one in compared]
    else:
        entries = [of_rows(results) for _, results in runs]
    return [*sections, Section(heading="Side by side", table=beside(runs, entries, refused, most), open=True)]


def refusal(one: Results, other: Results) -> str:
    """Why numbers of both are not compared; empty where they can be."""
    here, there = (
        [r.environments[i] for i in {row.environment for row in r.rows} & r.environments.keys()] for r in (one, other)
    )
    if not here or not there:
        return "not compared: the rows do not tell where they were measured"
    try:
        for first in here:
            for second in there:
                refuse_unlike(first, second)
    except BadInput as error:
        return str(error)
    return ""


def unlike(refused: Mapping[str, str]) -> list[str]:
    said = [f"{name} is {reason}." for name, reason in refused.items() if reason]
    return said or ["All were measured in like environments: ratios are to the first."]


def differences(runs: Runs) -> Table:
    def settings(results: Results) -> dict[str, str]:
        places = {f"{k} (machine)": v for place in results.environments.values() for k, v in place.identity.items()}
        found: dict[str, set[str]] = {}
        for row in results.rows:
            for key, value in row.conditions.items():
                found.setdefault(key, set()).add(plain(value))
        return {key: plain(value) for key, value in places.items()} | {
            key: next(iter(values)) for key, values in found.items() if len(values) == 1
        }

    told = [settings(results) for _, results in runs]
    keys = [key for key in dict.fromkeys(k for one in told for k in one) if len({one.get(key) for one in told}) > 1]
    rows = [[Cell(text=printable(key)), *(Cell(text=one.get(key, "")) for one in told)] for key in keys]
    if not rows:
        return Table(columns=[], rows=[], note="Nothing: the same settings on like machines.")
    return Table(columns=["", *(name for name, _ in runs)], rows=rows)


Entries = dict[tuple[object, ...], tuple[str, Row | None, float]]


def of_lines(run: BothLives) -> Entries:
    entries: Entries = {}
    for line in [*run.training, run.step, *run.inference]:
        label = f"{line.life}, {line.label}"
        entries[line.life, line.phase, "time"] = (f"{label}: time of a token", line.time, line.tokens)
        entries[line.life, line.phase, "memory"] = (f"{label}: peak memory", line.memory, 1.0)
    return dict(sorted(entries.items(), key=lambda entry: entry[0][2] == "memory"))


def of_rows(results: Results) -> Entries:
    """Rows meet where they agree on all that varies within their own run."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.experiment, row.life, row.phase, row.quantity, row.per, row.convention), []).append(row)
    entries: Entries = {}
    for group, rows in groups.items():
        varying = sorted(row_charts.telling(rows))
        for row in rows:
            at = tuple((key, row.conditions[key]) for key in varying if key in row.conditions)
            label = f"{row.life}, {row.phase}: {row.quantity}"
            label += f" ({', '.join(f'{key}={value}' for key, value in at)})" if at else ""
            entries[(*group, at)] = (label, row, 1.0)
    return entries


def beside(runs: Runs, entries: Sequence[Entries], refused: Mapping[str, str], most: int) -> Table:
    doubted = [doubts(results) for _, results in runs]
    rows = []
    for key in list(dict.fromkeys(key for one in entries for key in one))[:most]:
        found = [one.get(key, ("", None, 1.0)) for one in entries]
        cells = [Cell(text=printable(next(label for label, *_ in found if label)))]
        for n, (name, _) in enumerate(runs):
            _, row, divisor = found[n]
            cells.append(figure(row, doubted[n], divisor))
            if n:
                doubt = "; ".join(dict.fromkeys(why for each in (doubted[0], doubted[n]) for why in each.values()))
                cells.append(Cell(text="not compared") if refused[name] else against(found[n][1:], found[0][1:], doubt))
        rows.append(cells)
    first = runs[0][0]
    columns = [column for n, (name, _) in enumerate(runs) for column in ([name, f"÷ {first}"] if n else [name])]
    return Table(columns=["", *columns], rows=rows)


def against(one: tuple[Row | None, float], other: tuple[Row | None, float], doubted: str) -> Cell:
    (row, divisor), (base, base_divisor) = one, other
    if row is None or base is None or row.value is None or not base.value:
        return Cell(text="")
    tell = partial(told, row.provenance, doubted if row.samples else "")
    try:
        found = ratio_unpaired([s / divisor for s in row.samples], [s / base_divisor for s in base.samples])
    except BadInput:  # too few samples for an interval, or none, as of what is counted
        return tell(text=units.times(row.value / divisor / (base.value / base_divisor)))
    return judged(judge(found), row.provenance, doubted)
