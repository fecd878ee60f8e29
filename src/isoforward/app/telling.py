"""How rows are told, whatever they are of: a table, a sentence, the report, the W&B run. No tensor is needed."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

import isoforward
from isoforward.app.run_directory import claim
from isoforward.app.sweeps import InDirectory
from isoforward.base.config import ExperimentConfig, Run, TrackingConfig
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, Verdict, read, write
from isoforward.base.storage import write_text
from isoforward.base.terminal import say
from isoforward.show.compare import compare
from isoforward.show.tables import show, show_rows
from isoforward.show.wandb_tracker import Tracker, open_tracker

PACKAGE = Path(isoforward.__file__).parent

Answer = Callable[[Results], str]


class Tracked(InDirectory, Protocol):
    """The config of a command whose answer is shown, and tracked where that is asked for."""

    @property
    def tracking(self) -> TrackingConfig: ...


def command_line() -> str:
    script = Path(sys.argv[0])
    installed = script.parent == PACKAGE / "commands"
    return shlex.join([*(["isoforward", script.stem] if installed else ["python", sys.argv[0]]), *sys.argv[1:]])


def call(script: str) -> str:
    """How a script is called here: as a file in a clone, as a command where only the package is."""
    installed = (PACKAGE / "commands").is_dir()
    return f"isoforward {script}" if installed else f"python {script}.py"


def tell(
    config: Tracked,
    run_dir: Path,
    console: Console,
    answer: Answer,
    show: Callable[[Console, Results], None] = show_rows,
) -> None:
    """The rows as a table, the answer as a sentence, and the report, all from results.jsonl alone."""
    results = read(run_dir / "results.jsonl")
    show(console, results)
    told = answer(results)
    console.print(f"\n{told}\n", markup=False, highlight=False, style="bold")
    publish(config, run_dir, console, results, job_type="experiment", headline=told)


def tell_predictions(
    config: Tracked,
    rows: Sequence[Row],
    reasons: Sequence[str],
    answer: Answer,
    show: Callable[[Console, Results], None] = show_rows,
) -> None:
    """Of rows that nothing was measured for; `reasons` say what they rest on."""
    console = Console()
    with claim(config) as run_dir:
        where = environment(command_line(), None)
        judged = Verdict(experiment=rows[0].experiment, trusted=False, reasons=tuple(reasons), environment=where.id)
        placed = [dataclasses.replace(row, environment=where.id) for row in rows]
        write(run_dir / "results.jsonl", [where, *placed, judged])
        tell(config, run_dir, console, answer, show)


def conclude(config: Run, run_dir: Path, console: Console, *, job_type: str, sample: str | None = None) -> None:
    """Both lives side by side, one sentence, and the report, all from results.jsonl alone."""
    results = read(run_dir / "results.jsonl")
    comparison = compare(results)
    show(console, comparison)
    if sample:
        console.print(f"{sample}\n", markup=False, highlight=False)
    publish(config, run_dir, console, results, job_type=job_type, headline=comparison.headline, sample=sample)


def publish(
    config: Tracked,
    run_dir: Path,
    console: Console,
    results: Results,
    *,
    job_type: str,
    headline: str,
    sample: str | None = None,
) -> None:
    """The answer in a sentence, the report, the W&B run, and where everything is."""
    from isoforward.show.report import write_report

    write_text(run_dir / "answer.txt", f"{headline}\n")
    say(console, f"rows     {run_dir / 'results.jsonl'}")
    report = None
    try:
        report = write_report(results, run_dir / "report.html", headline=headline, sample=sample)
        say(console, f"report   {report}")
    except BadInput as refusal:  # the rows are there, and can be reported elsewhere
        say(console, f"report   none: {refusal}")
    with tracker_of(config, run_dir, console, job_type, results.rows[0].experiment) as tracker:
        if job_type == "inference":
            tracker.export(run_dir / "export", fingerprint_of(run_dir / "export"))
        tracker.rows(results)
        if report is not None:
            tracker.report(report)
    if tracker.url_or_sync:
        say(console, f"W&B      {tracker.url_or_sync}")


def tracker_of(config: Tracked, run_dir: Path, console: Console, job_type: str, question: str = "train") -> Tracker:
    return open_tracker(
        config.tracking,
        run_dir=run_dir,
        job_type=job_type,
        name=f"{run_dir.name} {job_type}",
        group=group_of(config, run_dir),
        resolved_config=dataclasses.asdict(config),
        tags=[question],
        say=lambda line: say(console, line),
    )


def group_of(config: Tracked, run_dir: Path) -> str:
    """All that is asked of one model goes with its training."""
    checkpoint = config.checkpoint if isinstance(config, ExperimentConfig) else None
    if checkpoint is None:
        return run_dir.name
    from isoforward.serve.inference import find_export  # and torch with it

    export = find_export(checkpoint).resolve()
    return export.parent.name if export.name == "export" else export.name


def fingerprint_of(exported: Path) -> str:
    from isoforward.formats.loading import read_manifest

    manifest = read_manifest(exported)
    assert manifest is not None
    return str(manifest["fingerprint"])
