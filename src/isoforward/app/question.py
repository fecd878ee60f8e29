"""What every experiment that measures shares: its subject, and the processes that it is measured in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from isoforward.app.run_directory import claim
from isoforward.app.telling import Answer, Tracked, command_line, tell
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, MeasureConfig, ModelConfig, Run, TrainConfig
from isoforward.base.device import best_device, device_of
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
from isoforward.base.results import Environment, Results, Row, Verdict, write
from isoforward.base.terminal import say
from isoforward.formats.checkpoint_file import is_checkpoint
from isoforward.formats.loading import find
from isoforward.measure import variants
from isoforward.measure.case import Case, with_kernels
from isoforward.measure.memory import account_rows
from isoforward.measure.passes import Build, measure_apart
from isoforward.model.kernels import training_products
from isoforward.serve.inference import find_export
from isoforward.serve.transformers_model import described
from isoforward.show.tables import show_rows

FRESH_VOCABULARY = 1024  # of fresh weights that no tokenizer belongs to: what data=shakespeare learns


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
    precision = precision_of(config, model, device)[0]
    case = configured(config, experiment, model, export=export, precision=precision, device=device)
    return with_kernels(case, rows=rows) if rows and model.source != "transformers" else case


def configured(
    config: TrainConfig | ExperimentConfig,
    experiment: str,
    model: ModelConfig,
    *,
    export: str | None,
    precision: str,
    device: torch.device,
) -> Case:
    return Case(
        experiment=experiment,
        model=model,
        export=export,
        batch=config.data.batch,
        length=fitting(config, model),
        compile=config.compile,
        precision=precision,
        device=str(device),
        hardware=config.hardware,
        threads=torch.get_num_threads(),
        seed=config.seed,
        optim=config.optim,
        measure=config.measure,
    )


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
