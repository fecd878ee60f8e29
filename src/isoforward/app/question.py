"""What every experiment shares: its subject, its directory, and how its rows are told."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

import isoforward
from isoforward.app.run_directory import claim
from isoforward.app.sweeps import InDirectory
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, MeasureConfig, ModelConfig, Run, TrackingConfig
from isoforward.base.device import best_device, device_of
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
from isoforward.base.results import Environment, Results, Row, Verdict, read, write
from isoforward.base.storage import write_atomically
from isoforward.base.terminal import say
from isoforward.formats.checkpoint_file import is_checkpoint
from isoforward.formats.export import find, read_manifest
from isoforward.measure import variants
from isoforward.measure.case import Case, with_kernels
from isoforward.measure.memory import account_rows
from isoforward.measure.passes import Build, measure_apart
from isoforward.model.kernels import training_products
from isoforward.serve.inference import find_export
from isoforward.serve.transformers_model import described
from isoforward.show.compare import compare
from isoforward.show.tables import show, show_rows
from isoforward.show.wandb_tracker import Tracker, open_tracker

Answer = Callable[[Results], str]


class Tracked(InDirectory, Protocol):
    """The config of a command whose answer is shown, and tracked where that is asked for."""

    @property
    def tracking(self) -> TrackingConfig: ...


PACKAGE = Path(isoforward.__file__).parent
FRESH_VOCABULARY = 1024  # of fresh weights that no tokenizer belongs to: what data=shakespeare learns


def command_line() -> str:
    script = Path(sys.argv[0])
    installed = script.parent == PACKAGE / "commands"
    return shlex.join([*(["isoforward", script.stem] if installed else ["python", sys.argv[0]]), *sys.argv[1:]])


def call(script: str) -> str:
    """How a script is called here: as a file in a clone, as a command where only the package is."""
    installed = (PACKAGE / "commands").is_dir()
    return f"isoforward {script}" if installed else f"python {script}.py"


def precision_of(config: Run, model: ModelConfig, device: torch.device) -> tuple[str, str]:
    """The precision of `model`, trained on batches of `config`, and why."""
    if config.precision != "auto":
        return config.precision, "as asked"
    products = training_products(model, config.data.batch * config.data.length)
    return device_of(device).quicker_precision(products)


def case_of(config: ExperimentConfig, experiment: str, *, rows: Sequence[int] = (1,)) -> Case:
    """The weights of `checkpoint`, or fresh ones of `model`; `rows` are the sequences that it decodes at once,
    none where nothing runs here.
    """
    device = best_device().where
    export = None
    model = config.model
    if config.checkpoint is not None:
        path = find_export(config.checkpoint)
        if is_checkpoint(path):
            raise BadInput(f"checkpoint={path} is a training checkpoint; experiments take an export or a run directory")
        export, model = str(path), find(path, verify=False).config
    elif model.source == "transformers":
        raise BadInput(f"{experiment} takes our own forward apart; model=transformers is what phase_costs measures")
    elif model.source == "hf":
        export, model = str(model.path), find(Path(str(model.path)), verify=False).config
    elif model.vocab is None:
        model = dataclasses.replace(model, vocab=FRESH_VOCABULARY)
    precision, length = precision_of(config, model, device)[0], fitting(config, model)
    case = Case(
        experiment=experiment,
        model=model,
        export=export,
        batch=config.data.batch,
        length=length,
        compile=config.compile,
        precision=precision,
        device=str(device),
        hardware=config.hardware,
        threads=torch.get_num_threads(),
        seed=config.seed,
        optim=config.optim,
        measure=config.measure,
    )
    return with_kernels(case, rows=rows) if rows and model.source != "transformers" else case


def wrapped_case(config: ExperimentConfig, experiment: str) -> Case:
    model, labels = described(Path(str(config.model.path)))
    case = case_of(dataclasses.replace(config, model=dataclasses.replace(model, source="fresh")), experiment)
    return dataclasses.replace(case, model=model, labels=labels)


def fitting(config: Run, model: ModelConfig) -> int:
    if config.data.length > model.context:
        raise BadInput(
            f"data.length={config.data.length} is longer than the model's context of {model.context}; "
            f"write data.length={model.context}"
        )
    return config.data.length


class Asking:
    """A question under way. Rows hold in the environment that was the first to be noted."""

    def __init__(self, run_dir: Path) -> None:
        self.results, self.console = run_dir / "results.jsonl", Console()
        self.environment, self.noted = "", list[Environment]()

    def say(self, line: str) -> None:
        say(self.console, line)

    def note(self, device: str = "cpu") -> None:
        """What follows was had in this process, on `device`."""
        self.noted = [environment(command_line(), torch.device(device))]  # written with the first rows
        self.environment = self.noted[0].id

    def measure(self, case: Case, build: Build, *more: object) -> None:
        """Appends what `build(case, *more)` is measured to, in fresh processes."""
        where = measure_apart(case, build, *more, results=self.results, command=command_line())
        self.environment = self.environment or where

    def add(self, rows: Iterable[Row], verdict: Verdict | None = None) -> list[Row]:
        placed = [dataclasses.replace(row, environment=self.environment) for row in rows]
        judged = [] if verdict is None else [dataclasses.replace(verdict, environment=self.environment)]
        write(self.results, [*self.noted, *placed, *judged])
        self.noted = []
        return placed


@contextmanager
def asking(config: Tracked, answer: Answer, show: Callable[[Console, Results], None] = show_rows) -> Iterator[Asking]:
    """The run's directory while it is measured, and then its rows, the answer and the report."""
    with claim(config) as run_dir:
        run = Asking(run_dir)
        yield run
        tell(config, run_dir, run.console, answer, show)


def ask(
    config: ExperimentConfig, question: str, build: Build, answer: Answer, *more: object, rows: Sequence[int] = (1,)
) -> None:
    """Measures what `build(case, *more)` gives, in fresh processes; shows the rows and the answer."""
    case = case_of(config, question, rows=rows)
    with asking(config, answer) as run:
        run.say(f"measuring {question}{at_most(config.measure)}")
        run.measure(case, build, *more)


def ask_variants(config: ExperimentConfig, cases: Sequence[Case], answer: Answer) -> None:
    """A training step under each case, against the first: its time, and then its memory."""
    with asking(config, answer) as run:
        run.say(f"measuring {cases[0].experiment}{at_most(config.measure)}")
        run.measure(cases[0], variants.bench, cases)
        for case in cases:
            run.add(account_rows(case, "training"))


def at_most(plan: MeasureConfig) -> str:
    if plan.repeats is not None:
        return f", {plan.repeats} samples of each"
    whole_s = plan.budget * plan.processes
    return f", {units.seconds(whole_s)} of timing at most (measure.budget)"


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
    with asking(config, answer, show) as run:
        run.note()
        run.add(rows, Verdict(experiment=rows[0].experiment, trusted=False, reasons=tuple(reasons)))


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

    write_atomically(run_dir / "answer.txt", lambda file: file.write(f"{headline}\n".encode()))
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
    export = find_export(checkpoint).resolve()
    return export.parent.name if export.name == "export" else export.name


def fingerprint_of(exported: Path) -> str:
    manifest = read_manifest(exported)
    assert manifest is not None
    return str(manifest["fingerprint"])
