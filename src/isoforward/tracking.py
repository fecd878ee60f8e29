"""Results and live numbers to Weights & Biases: online where a key is set, else offline, to be synced later.

The only file that imports wandb, and only once something is to be tracked. No run waits for it longer than its bounds,
or fails because of it. Dashboards as code: `python -m isoforward.tracking workspace|report --entity E --project P`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from isoforward.compare import cache_curve, compare, memory_ledger, select
from isoforward.config import TrackingConfig
from isoforward.errors import BadInput, Refusal, StorageFailed
from isoforward.results import LIVES, Results

INIT_TIMEOUT_S = 10.0  # WANDB_INIT_TIMEOUT
FINISH_TIMEOUT_S = 60.0  # WANDB_FINISH_TIMEOUT
JOB_TYPES = ("train", "inference", "experiment")
TRAINED = ("forward", "loss", "backward", "optimizer")

Say = Callable[[str], object]
Points = list[list[str | float]]


class Tracker:
    """What a command may tell. This one keeps nothing."""

    url_or_sync = ""  # where to look: the run's page, or the command that uploads an offline run
    run_id: str | None = None

    def live(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes some 0.5 ms: never call it inside a timed region."""

    def rows(self, results: Results) -> None:
        """All rows as a table, the charts that they make, and the comparison of both lives as summary metrics."""

    def report(self, path: Path) -> None: ...

    def export(self, directory: Path, fingerprint: str) -> None:
        """A training run logs the model; any other uses it, which ties the two in W&B's lineage."""

    def finish(self, exit_code: int = 0) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.finish(error.exit_code if isinstance(error, Refusal) else 1)


class WandbTracker(Tracker):
    def __init__(self, run: Any, job_type: str, say: Say) -> None:
        self.run, self.job_type, self.say = run, job_type, say
        self.told: set[str] = set()
        self.run_id = run.id
        self.sync = f"wandb sync {shlex.quote(run.settings.sync_dir)}"
        self.url_or_sync = self.sync if run.offline else run.url
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """What goes wrong in a tracker is told, once for each `what`; what it tracks goes on."""
        try:
            action()
        except Exception as error:
            if what not in self.told:
                self.told.add(what)
                self.say(f"W&B: {what} could not be tracked ({first_line(error)}); going on without")

    def live(self, step: int, metrics: Mapping[str, float]) -> None:
        self.attempt("training", lambda: self.run.log({"step": step, **metrics}))

    def rows(self, results: Results) -> None:
        def log() -> None:
            import wandb

            self.run.summary.update(summary(results))
            identities = {one.id: dict(one.identity) for one in results.environments.values()}
            self.run.config.update({"environments": identities}, allow_val_change=True)
            rows = wandb.Table(columns=list(COLUMNS), data=table(results))
            drawn = {
                f"charts/{chart.key}": wandb.plot_table(
                    chart.vega, wandb.Table(columns=list(chart.columns), data=points), chart.fields, chart.strings
                )
                for chart in CHARTS
                if (points := chart.points(results))
            }
            self.run.log({"rows": rows, **drawn})

        self.attempt("results", log)

    def report(self, path: Path) -> None:
        def log() -> None:
            import wandb

            self.run.log({"report": wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

        self.attempt(str(path), log)

    def export(self, directory: Path, fingerprint: str) -> None:
        def log() -> None:
            import wandb

            model = wandb.Artifact(f"export-{fingerprint[:16]}", type="model", metadata={"fingerprint": fingerprint})
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                name = path.relative_to(directory).as_posix()
                model.add_file(str(path), name=name, policy="immutable", skip_cache=True)  # no second copy on disk
            if self.job_type == "train":
                self.run.log_artifact(model)
            else:  # use_artifact refuses offline, and online waits for the upload without a bound
                self.run._log_artifact(model, is_user_created=True, use_after_commit=True)
            self.run.summary["fingerprint"] = fingerprint

        self.attempt(str(directory), log)

    def finish(self, exit_code: int = 0) -> None:
        try:
            self.run.finish(exit_code=exit_code)
        except Exception as error:
            self.url_or_sync = self.sync
            self.say(f"W&B did not take everything ({first_line(error)}); later: {self.sync}")


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path,
    job_type: str,
    name: str,
    group: str | None,
    resolved_config: Mapping[str, Any],
    resume_id: str | None = None,
    say: Say = to_stderr,
) -> Tracker:
    """Never prompts, and never takes much longer than INIT_TIMEOUT_S; falls back to offline, in one line to `say`.

    `job_type` is one of JOB_TYPES. `resume_id` goes on with an online run; an offline one starts anew in its group.
    """
    if config.mode == "none":
        return Tracker()
    wandb_dir = run_dir.resolve() / "wandb"
    os.environ.update(
        dict.fromkeys(("WANDB_ARTIFACT_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"), f"{wandb_dir}/staging")
    )
    quieten()
    try:
        wandb_dir.mkdir(parents=True, exist_ok=True)
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S)),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT_S)),
            finish_timeout_raises=True,
            host="",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            label_disable=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        about: dict[str, Any] = {
            "dir": str(run_dir.resolve()),
            "project": config.project,
            "entity": config.entity,
            "group": config.group or group,
            "job_type": job_type,
            "name": name,
            "tags": list(config.tags),
            "config": dict(resolved_config),
            "settings": settings,
        }
        run = online(wandb, about, wandb_dir, resume_id, say) if wants_online(wandb, config.mode, say) else None
        if run is None:
            run = wandb.init(mode="offline", **about)
        return WandbTracker(run, job_type, say)
    except Exception as error:
        say(f"W&B: not tracking ({first_line(error)})")
        return Tracker()


def quieten() -> None:
    """Before wandb is imported, which reads these once."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits 20 s at exit for a host that does not answer
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", "10")  # seconds; tables and artifacts of an online run ask the host


def wants_online(wandb: Any, mode: str, say: Say) -> bool:
    if mode == "wandb":
        os.environ["WANDB_MODE"] = "online"
    elif os.environ.get("WANDB_MODE", "online") != "online":
        return False
    try:
        key = wandb.login(prompt=False, verify=False)
    except Exception as error:
        say(f"W&B: the key cannot be used ({first_line(error)}); tracking offline")
        return False
    if mode == "wandb" and not key:
        say("W&B: no key is set; tracking offline. For online: wandb login, or WANDB_API_KEY")
    return bool(key)


def online(wandb: Any, about: Mapping[str, Any], wandb_dir: Path, resume_id: str | None, say: Say) -> Any:
    """None where the host does not answer, or does not let us in."""
    before = set(wandb_dir.iterdir())
    try:
        return wandb.init(mode="online", id=resume_id, resume="allow" if resume_id else None, **about)
    except Exception as error:
        say(f"W&B cannot be reached ({first_line(error)}); tracking offline")
        for left in set(wandb_dir.glob("run-*")) - before:
            shutil.rmtree(left, ignore_errors=True)
        return None


COLUMNS = (
    *("experiment", "life", "phase", "quantity", "unit", "per", "value", "low", "high"),
    *("provenance", "convention", "reason", "warnings", "conditions", "environment"),
)


def table(results: Results) -> list[list[str | float | None]]:
    return [
        [
            *(row.experiment, row.life, row.phase, row.quantity, row.unit, row.per, row.value, row.low, row.high),
            *(row.provenance, row.convention, row.reason, "; ".join(row.warnings)),
            *(json.dumps(dict(row.conditions), sort_keys=True), row.environment),
        ]
        for row in results.rows
    ]


def summary(results: Results) -> dict[str, float | bool]:
    """`phase/forward/time_s`, `training/time_ratio`, ...; no ratios where the two lives cannot be compared."""
    figures: dict[str, float | bool | None] = {}
    if results.verdicts:
        figures["trusted"] = all(verdict.trusted for verdict in results.verdicts)
    try:
        found = compare(results)
    except BadInput:
        return {name: value for name, value in figures.items() if value is not None}
    figures |= {
        "training/time_ratio": found.time_ratio.value,
        "training/flops_ratio": found.flops_ratio,
        "training/memory_ratio": found.memory_ratio,
        "training/residual_share": found.residual,
        "inference/decode_ratio": found.decode_ratio,
    }
    for line in (*found.training, found.step, *found.inference):
        name = "frozen_forward" if (line.life, line.phase) == ("inference", "forward") else line.phase
        figures |= {
            f"phase/{name}/time_s": line.time.value if line.time else None,
            f"phase/{name}/time_per_token_s": line.time_per_token_s,
            f"phase/{name}/tokens_per_s": line.tokens_per_s,
            f"phase/{name}/flops": line.flops.value if line.flops else None,
            f"phase/{name}/flops_per_s": line.flops_per_s,
            f"phase/{name}/peak_bytes": line.memory.value if line.memory else None,
        }
    return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture that a run logs with its points, and that the workspace shows for all runs: same key, same fields."""

    key: str
    title: str
    vega: str  # a chart that every W&B server knows
    columns: tuple[str, ...]
    points: Callable[[Results], Points] = field(repr=False)
    x_name: str | None = None

    @property
    def fields(self) -> dict[str, str]:
        names = ("label", "value") if self.vega == "wandb/bar/v0" else ("step", "lineKey", "lineVal")
        return dict(zip(names, self.columns, strict=True))

    @property
    def strings(self) -> dict[str, str]:
        return {"title": self.title} | ({"xname": self.x_name} if self.x_name else {})


def two_lives(results: Results) -> Points:
    try:
        found = compare(results)
    except BadInput:
        return []
    lines = [*found.training, *found.inference]
    return [
        [f"{line.life}: {line.phase}", line.time_per_token_s] for line in lines if line.time_per_token_s is not None
    ]


def ladder(results: Results) -> Points:
    rungs = [row for row in select(results, quantity="time", cold=None) if row.conditions.get("rung") is not None]
    return [[str(row.conditions["rung"]), row.value] for row in rungs if row.value is not None]


def ledger(results: Results) -> Points:
    return [[f"{life}: {category}", size] for life in LIVES for category, size in memory_ledger(results, life).items()]


def cache(results: Results) -> Points:
    return [
        [context, "KV cache" if cached else "no cache", row.value]
        for cached, curve in cache_curve(results).items()
        for context, row in curve
        if row.value is not None
    ]


def break_even(results: Results) -> Points:
    return [
        [row.conditions["served_tokens"], f"{row.life}, {row.unit}", row.value]  # type: ignore[list-item]
        for row in results.rows
        if row.conditions.get("served_tokens") is not None and row.value is not None
    ]


BAR, LINES = "wandb/bar/v0", "wandb/lineseries/v0"
CHARTS = (
    Chart(
        key="two_lives",
        title="time of one token by phase, both lives (s)",
        vega=BAR,
        columns=("phase", "time_per_token_s"),
        points=two_lives,
    ),
    Chart(
        key="ladder",
        title="what each rung from inference to training costs (s)",
        vega=BAR,
        columns=("rung", "time_s"),
        points=ladder,
    ),
    Chart(
        key="ledger",
        title="what fills the memory at its peak (bytes)",
        vega=BAR,
        columns=("category", "bytes"),
        points=ledger,
    ),
    Chart(
        key="cache",
        title="one more token, with a KV cache and without (s)",
        vega=LINES,
        columns=("context", "cache", "time_s"),
        points=cache,
        x_name="tokens before it",
    ),
    Chart(
        key="break_even",
        title="when serving overtakes training",
        vega=LINES,
        columns=("served_tokens", "life", "cost"),
        points=break_even,
        x_name="tokens served",
    ),
)


def designs() -> tuple[Any, Any]:
    """`wandb_workspaces.workspaces` and `wandb_workspaces.reports.v2`."""
    quieten()
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise BadInput(
            "dashboards need the package wandb-workspaces: pip install 'isoforward[wandb-workspaces]'"
        ) from None
    return workspaces, reports


def sections() -> dict[str, list[Any]]:
    """Panels by the question that they answer; the same for the workspace and the report."""
    _, reports = designs()

    def line(title: str, *metrics: str, **how: Any) -> Any:
        return reports.LinePlot(title=title, x="step", y=list(metrics), **how)

    def bar(title: str, quantity: str, phases: Sequence[str]) -> Any:
        return reports.BarPlot(title=title, metrics=[f"phase/{phase}/{quantity}" for phase in phases])

    def custom(key: str) -> Any:
        chart = next(chart for chart in CHARTS if chart.key == key)
        return reports.CustomChart(
            query={"summaryTable": {"tableKey": f"charts/{key}_table"}},
            chart_name=chart.vega,
            chart_fields=chart.fields,
            chart_strings=chart.strings,
        )

    shares = [f"phase/{phase}_share" for phase in TRAINED]
    lives = (*TRAINED, "frozen_forward", "prefill", "decode")
    return {
        "Where a training step goes": [
            line("share of each phase", *shares, plot_type="pct-area"),
            line("loss (nats per token)", "loss", "validation_loss"),
            line("tokens per second", "tokens_per_s"),
        ],
        "Training against inference": [
            custom("two_lives"),
            bar("time per token (s)", "time_per_token_s", lives),
            reports.ScalarChart(title="a training step against its forward, in time", metric="training/time_ratio"),
            reports.ScalarChart(title="in FLOPs", metric="training/flops_ratio"),
            reports.ScalarChart(title="in memory", metric="training/memory_ratio"),
            reports.ScalarChart(title="a decoded token against a trained one", metric="inference/decode_ratio"),
        ],
        "The ladder from inference to training": [custom("ladder")],
        "The memory ledger": [custom("ledger"), bar("peak of each phase (bytes)", "peak_bytes", lives)],
        "With a KV cache, and without": [custom("cache")],
        "Break-even": [custom("break_even")],
        "Report": [reports.MediaBrowser(title="report.html", media_keys=["report"])],
    }


def workspace(entity: str, project: str) -> Any:
    """The view "two lives" as a `wandb_workspaces.workspaces.Workspace`, not saved yet."""
    workspaces, reports = designs()
    from wandb_workspaces.expr import Metric

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="two lives",
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in arranged(reports).items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step"),
        runset_settings=workspaces.RunsetSettings(groupby=[Metric("Group"), Metric("JobType")]),
    )


def report(entity: str, project: str) -> Any:
    """The same panels, training runs against inference runs, as a `wandb_workspaces.reports.v2.Report`."""
    _, reports = designs()
    from wandb_workspaces.expr import And, Metric

    blocks: list[Any] = [reports.TableOfContents()]
    for name, panels in arranged(reports).items():
        runs = [reports.Runset(name=job_type, filters=And(Metric("JobType") == job_type)) for job_type in JOB_TYPES]
        blocks += [reports.H2(name), reports.PanelGrid(runsets=runs, panels=panels)]
    return reports.Report(
        entity=entity,
        project=project,
        title="One forward, two lives",
        description="What training adds to the forward pass, and what serving costs.",
        blocks=blocks,
    )


def arranged(reports: Any) -> dict[str, list[Any]]:
    """Three panels abreast."""
    found = sections()
    for panels in found.values():
        for place, panel in enumerate(panels):
            panel.layout = reports.Layout(x=8 * (place % 3), y=6 * (place // 3), w=8, h=6)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m isoforward.tracking", description="Makes W&B dashboards.")
    parser.add_argument("what", choices=("workspace", "report"))
    parser.add_argument("--entity", required=True, help="the W&B user or team")
    parser.add_argument("--project", required=True)
    asked = parser.parse_args(argv)
    try:
        print(save(asked.what, asked.entity, asked.project))
    except Refusal as refusal:
        to_stderr(f"error: {refusal}")
        return refusal.exit_code
    return 0


def save(what: str, entity: str, project: str) -> str:
    """Where it is to be seen."""
    designs()
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            raise BadInput("W&B knows no key: run wandb login, or set WANDB_API_KEY")
        made = workspace(entity, project) if what == "workspace" else report(entity, project)
        return str(made.save().url)
    except Refusal:
        raise
    except Exception as error:
        raise StorageFailed(f"W&B did not take the {what} of {entity}/{project}: {first_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
