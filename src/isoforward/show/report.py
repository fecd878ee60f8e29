"""Rows -> one HTML file that opens offline and asks the network for nothing; PNGs and Markdown from the same rows.

Whatever rows hold is a stranger's text: the template escapes all of it, and its Content-Security-Policy runs no script
but the two whose hashes it names.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from isoforward.base import units
from isoforward.base.caches import cache_directory
from isoforward.base.errors import BadInput, Refusal, StorageFailed
from isoforward.base.results import Environment, Results, at_most_one, read, select
from isoforward.base.storage import write_atomically
from isoforward.base.terminal import print_what_can_be_encoded
from isoforward.base.vocabulary import Condition
from isoforward.show import charts
from isoforward.show.charts import printable
from isoforward.show.compare import BothLives
from isoforward.show.compare_runs import side_by_side
from isoforward.show.report_sections import (
    Cell,
    Download,
    Runs,
    Section,
    Table,
    any_rows,
    both_lives,
    comparison_of,
    every_row,
    experiments,
    judged,
    phase_table,
    plain,
    slug,
    told,
)

LETTERS = {"measured": "m", "counted": "c", "predicted": "p", "estimated": "e", "unavailable": "–"}
MOST_ROWS = 400  # of all runs together: the file stays below 1.5 MB
MOST_SECTIONS = 24
MOST_DRAWN = 4  # runs, each on its own too
SAMPLE = 20_000  # characters


Facts = list[tuple[str, str]]
Place = tuple[str, str, Facts, Facts]  # command, when, what must match, what may differ


@dataclass(frozen=True, kw_only=True)
class View:
    """What the page shows of one run."""

    name: str
    sentence: str
    facts: list[str]
    says: list[tuple[str, str, str]]  # good, doubt or neither; what; why
    doubted: bool  # whether any figure carries its mark
    tiles: list[Cell]
    sections: list[Section]
    places: list[Place]
    rows: Table
    csv: Download


def write_report(
    results: Results | Runs,
    path: Path | str,
    *,
    sample: str | None = None,
    headline: str | None = None,
    title: str = "One forward, two lives",
) -> Path:
    """Several runs are laid side by side. `sample` is text that the model wrote; `headline` the answer in a sentence,
    which else is the comparison's."""
    runs = [("This run", results)] if isinstance(results, Results) else results
    page = render(runs, sample=sample, headline=headline, title=title).encode("utf-8", "replace")
    write_atomically(Path(path), partial(put, page))
    return Path(path)


def render(runs: Runs, *, sample: str | None, headline: str | None, title: str) -> str:
    import jinja2
    from markupsafe import Markup

    def sha256(script: str) -> str:
        return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"raw": Markup, "sha256": sha256}
    template = environment.from_string(resources.files("isoforward.show").joinpath("report.html.in").read_text("utf-8"))
    drawn = len(runs) <= MOST_DRAWN
    views = [view(name, results, most=MOST_ROWS // len(runs), drawn=drawn) for name, results in runs]
    sentence = views[0].sentence if len(views) == 1 else f"{' beside '.join(one.name for one in views)}"
    return template.render(
        title=title,
        headline=re.split(r"(\d[\d,.]*x\b)", headline or sentence),
        runs=views,
        beside=side_by_side(runs, MOST_ROWS) if len(runs) > 1 else [],
        sample=sample and sample[:SAMPLE],
        javascript=javascript(),
        light=charts.LIGHT,
        dark=charts.DARK,
        font=charts.FONT,
        colours=charts.PHASE_COLOURS,
        letters=LETTERS,
    )


@cache
def javascript() -> str:
    """Vega, which draws the pictures. Bundling it takes seconds: it is done once for each version, and kept."""
    name = f"vega-lite-{charts.VEGA_LITE}_vl-convert-{version('vl-convert-python')}.js"
    with suppress(OSError, UnicodeError, StorageFailed):
        return cache_directory("vega", name).read_text("utf-8")
    bundle = bundled()
    with suppress(StorageFailed):  # bundled again next time
        write_atomically(cache_directory("vega", name), partial(put, bundle.encode()))
    return bundle


def bundled() -> str:
    """BadInput where the engine of the charts does not start."""
    import vl_convert

    try:
        bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", charts.VEGA_LITE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise BadInput(
            "a report cannot be made here: the engine of its charts wants a /proc that it can read"
        ) from error
    return bundle


def view(name: str, results: Results, *, most: int = MOST_ROWS, drawn: bool = True) -> View:
    says = [("doubt", "The file is damaged:", f"{printable(warning)}.") for warning in results.warnings]
    sections: list[Section] = []
    for experiment, part, compared in experiments(results):
        says.append(verdict(experiment, part))
        if isinstance(compared, BothLives):
            says.append(identity(compared))
            sections += both_lives(compared) if drawn else []
        else:
            if compared and select(part, quantity="identity"):  # else nobody meant to
                says.append(("doubt", "Both lives are not compared:", f"{compared.removeprefix('not compared: ')}."))
            sections += any_rows(experiment, part, most) if drawn else []
    run = comparison_of(results)
    names = ", ".join(dict.fromkeys(row.experiment.replace("_", " ") for row in results.rows))
    rows, csv = every_row(results, most)
    return View(
        name=name,
        sentence=run.headline if run else printable(names.capitalize() or "No rows"),
        facts=about(run) if run else [f"{len(results.rows)} rows"],
        says=says,
        doubted=bool(results.doubts or (run and run.warnings)) or any(row.warnings for row in results.rows),
        tiles=ratios(run) if run else [],
        sections=sections[:MOST_SECTIONS],
        places=places(results),
        rows=rows,
        csv=csv,
    )


def verdict(experiment: str, results: Results) -> tuple[str, str, str]:
    if results.doubts:
        return "doubt", "Take these numbers with care:", printable(f"{'; '.join(results.doubts)}.", 2000)
    if not results.verdicts:
        return "", "Nothing vouches for these numbers:", f"{printable(experiment)} recorded no verdict."
    return "good", "These numbers can be trusted:", "known as precisely as was asked, and nothing disturbed them."


def identity(run: BothLives) -> tuple[str, str, str]:
    row = at_most_one(run.results, quantity="identity")
    logits = row.conditions.get("logits") if row else None
    count = f"0 of {logits:,} logits differ" if isinstance(logits, int) else "no logit differs"
    return "good", "One forward:", f"{count} between training's and the frozen one, bit for bit, on these weights."


def about(run: BothLives) -> list[str]:
    where = run.conditions
    told = {
        "parameters": "{:,} parameters",
        "family": "{}",
        "layers": "layers {}",
        "width": "width {}",
        "dtype": "{}",
        "batch": f"training on {{}} x {where.get('length')} tokens",
        "optimizer": "{}",
    }
    return [printable(text.format(where[key])) for key, text in told.items() if where.get(key) is not None]


def ratios(run: BothLives) -> list[Cell]:
    """The four answers, each with its origin."""
    doubted, held = "; ".join(run.warnings), run.step.memory
    assert run.step.against_forward is not None
    time = judged(run.step.against_forward, "measured", doubted)
    tiles = [replace(time, phase="the time of its forward, for a training step")]
    if run.flops_ratio is not None:
        ratio_of_flops = units.times(run.flops_ratio)
        tiles.append(Cell(text=ratio_of_flops, phase="its FLOPs", origin="counted", hint="model convention"))
    if run.memory_ratio is not None and held is not None:
        tiles.append(Cell(text=units.times(run.memory_ratio), phase="its peak memory", origin=held.provenance))
    decode = told("measured", doubted, text=units.times(run.decode_ratio))
    return [*tiles, replace(decode, phase="the time of a trained token, for a decoded one")]


def places(results: Results) -> list[Place]:
    """Each environment once, however many passes were made in it."""

    def facts(told: Mapping[str, Condition]) -> Facts:
        return [(printable(key), plain(value)) for key, value in told.items() if value is not None]

    used = {row.environment for row in results.rows}
    found: dict[str, Environment] = {}
    for place in results.environments.values():
        if place.id in used:
            found.setdefault(f"{place.command}{sorted(place.identity.items())}", place)
    return [
        (printable(place.command, 4000), printable(place.created), facts(place.identity), facts(place.details))
        for place in found.values()
    ]


def markdown(runs: Runs) -> str:
    """For pull requests: sentence, verdict and table of each run, and what they say beside each other."""
    lines = []
    for name, results in runs:
        one = view(name, results)
        run = comparison_of(results)
        lines += [f"### {escaped(name)}", ""] if len(runs) > 1 else []
        lines += [f"**{escaped(one.sentence)}**", ""]
        for table in [phase_table(run)] if run else [part.table for part in one.sections if part.table]:
            lines += [*markdown_table(table), ""]
        lines += [f"- {escaped(f'{what} {why}')}" for _, what, why in one.says]
        lines += [f"- `{command.replace('`', ' ')}`, {escaped(created)}" for command, created, *_ in one.places]
        lines.append("")
    for part in side_by_side(runs, MOST_ROWS) if len(runs) > 1 else []:
        if part.open and part.table:
            lines += [f"### {part.heading}", "", escaped(part.lede), "", *markdown_table(part.table), ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(table: Table) -> list[str]:
    def told(cell: Cell) -> str:
        origin = (
            f" ({cell.origin}{', in doubt' if cell.doubt else ''})" if cell.origin not in ("", "unavailable") else ""
        )
        return escaped(f"{cell.text}{f', {cell.below}' if cell.below else ''}{origin}")

    rows = [[told(cell) for cell in row] + [""] * (len(table.columns) - len(row)) for row in table.rows]
    aligned = ["---:" if n in table.numeric else "---" for n in range(len(table.columns))]
    shown = [[escaped(column) for column in table.columns], aligned, *rows]
    lines = [f"| {' | '.join(row)} |" for row in shown] if rows else []
    return lines + (["", escaped(table.note)] if table.note else [])


def escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", printable(text, 4000).replace("&", "&amp;").replace("<", "&lt;"))


def write_pngs(runs: Runs, directory: Path) -> list[Path]:
    shown = [(f"{slug(name)}_", view(name, results).sections) for name, results in runs]
    shown = [("", shown[0][1])] if len(runs) == 1 else [("", side_by_side(runs, MOST_ROWS)), *shown]
    written: list[Path] = []
    for prefix, sections in shown:
        for chart in (section.chart for section in sections if section.chart):
            path = directory / f"{prefix}{slug(chart.name)}.png"
            path = path if path not in written else path.with_stem(f"{path.stem}_{len(written)}")
            write_atomically(path, partial(put, chart.png()))
            written.append(path)
    return written


def put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def named(paths: list[Path]) -> list[tuple[str, Results]]:
    runs: list[tuple[str, Results]] = []
    for path in paths:
        rows = path / "results.jsonl" if path.is_dir() else path
        if not rows.is_file():
            raise BadInput(f"{path}: no results.jsonl is there; name a run directory or its results.jsonl")
        name = printable(rows.resolve().parent.name)
        taken = sum(other.partition(" (")[0] == name for other, _ in runs)
        runs.append((f"{name} ({taken + 1})" if taken else name, read(rows)))
    return runs


def answer(directory: Path) -> str | None:
    """The sentence that the experiment itself ended with."""
    path = directory / "answer.txt"
    return path.read_text("utf-8", "replace")[:2000].strip() if path.is_file() else None


def main(argv: list[str] | None = None) -> int:
    print_what_can_be_encoded()
    parser = argparse.ArgumentParser(
        prog="isoforward report", description="Makes the report of a run, or lays several runs side by side."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or its results.jsonl")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="report.html beside the run's results; comparison.html for several"
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="write each picture as a PNG too")
    parser.add_argument("--markdown", action="store_true", help="print sentence and tables as Markdown too")
    asked = parser.parse_args(argv)
    try:
        runs = named(asked.runs)
        home = asked.runs[0] if asked.runs[0].is_dir() else asked.runs[0].parent
        output = asked.output or (home / "report.html" if len(runs) == 1 else Path("comparison.html"))
        written = [write_report(runs, output, headline=answer(home) if len(runs) == 1 else None)]
        if asked.png:
            written += write_pngs(runs, asked.png)
        if asked.markdown:
            print(markdown(runs))
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    for path in written:
        print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
