"""Results and live numbers to Weights & Biases: online where a key is set, else offline, to be synced later.

The only file that imports wandb, and only once something is to be tracked. No run waits for it longer than its bounds,
or fails because of it. Dashboards as code:
`python -m isoforward.show.wandb_tracker workspace|report --entity E --project P`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self

from isoforward.base.config import TrackingConfig
from isoforward.base.errors import BadInput, Refusal, StorageFailed
from isoforward.base.results import Results
from isoforward.show.panels import CHARTS, COLUMNS, summary, table

if TYPE_CHECKING:
    from wandb import Run
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

INIT_TIMEOUT_S = 10.0  # WANDB_INIT_TIMEOUT
FINISH_TIMEOUT_S = 60.0  # WANDB_FINISH_TIMEOUT

Say = Callable[[str], object]


class Tracker:
    """What a command may tell. This one keeps nothing."""

    url_or_sync = ""  # where to look: the run's page, or the command that uploads an offline run
    run_id: str | None = None

    def live(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes some 0.5 ms: never call it inside a timed region."""

    def outcome(self, numbers: Mapping[str, float]) -> None:
        """What training came to, as summary metrics."""

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
    def __init__(self, run: Run, job_type: str, say: Say, *, axes: bool = True) -> None:
        self.run, self.job_type, self.say = run, job_type, say
        self.told: set[str] = set()
        self.run_id = run.id
        self.sync = f"wandb sync {shlex.quote(run.settings.sync_dir)}"
        self.url_or_sync = self.sync if run.offline else run.url
        if axes:
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

    def outcome(self, numbers: Mapping[str, float]) -> None:
        self.attempt("outcome", lambda: self.run.summary.update(dict(numbers)))

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
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    if "validation error" in first and len(more) > 1:  # of W&B's settings, which the environment sets
        first = f"WANDB_{more[0].strip().upper()}: {more[1].strip().partition(' [')[0]}"
    return first[:160]


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path,
    job_type: str,
    name: str,
    group: str | None,
    resolved_config: Mapping[str, object],
    tags: Sequence[str] = (),
    resume_id: str | None = None,
    say: Say = to_stderr,
) -> Tracker:
    """Never prompts, and never takes much longer than INIT_TIMEOUT_S; falls back to offline, in one line to `say`.

    `job_type` is one of JOB_TYPES. `resume_id` goes on with an online run; an offline one starts anew in its group.
    """
    if config.mode == "none" or (config.mode == "auto" and switched_off()):
        return Tracker()
    holder = Path(os.environ.get("WANDB_DIR") or run_dir).resolve()
    wandb_dir = holder / "wandb"
    stage(run_dir.resolve() / "wandb" / "staging")
    quieten()
    try:
        wandb_dir.mkdir(parents=True, exist_ok=True)
        import wandb

        ours = {name: value for name, value in OURS.items() if f"WANDB_{name.upper()}" not in os.environ}
        settings = wandb.Settings(**ours)
        begin = partial(
            wandb.init,
            dir=str(holder),
            project=config.project or os.environ.get("WANDB_PROJECT") or "isoforward",
            entity=config.entity or os.environ.get("WANDB_ENTITY"),
            group=config.group or os.environ.get("WANDB_RUN_GROUP") or group,
            job_type=os.environ.get("WANDB_JOB_TYPE") or job_type,
            name=os.environ.get("WANDB_NAME") or name,
            tags=[*(config.tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]), *tags],
            config=dict(resolved_config),
            settings=settings,
        )
        run = online(begin, wandb_dir, resume_id, say) if wants_online(wandb, config.mode, say) else None
        if run is None:
            run = begin(mode="offline")
        return WandbTracker(run, job_type, say)
    except Exception as error:
        say(f"W&B: not tracking ({first_line(error)})")
        return Tracker()


def tell_open_run(results: Results, report: Path, say: Say = to_stderr) -> None:
    """Rows, charts and report to the run that the user's own code has open in this process, if there is one.

    Its x axes and its end stay the user's.
    """
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        tracker = WandbTracker(run, "attach", say, axes=False)
        tracker.rows(results)
        tracker.report(report)


OURS: dict[str, object] = {  # settings; those whose WANDB_ variable is set are left to it
    "silent": True,
    "console": "off",
    "init_timeout": INIT_TIMEOUT_S,
    "finish_timeout": FINISH_TIMEOUT_S,
    "finish_timeout_raises": True,
    "host": "",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "label_disable": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


STAGED = dict[str, str]()  # W&B's variables as they were set here, for the run before in this process


def stage(directory: Path) -> None:
    """What W&B keeps on its way goes into the run, unless its own variables say where."""
    for variable in ("WANDB_ARTIFACT_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        if os.environ.get(variable, "") in ("", STAGED.get(variable)):
            os.environ[variable] = STAGED[variable] = str(directory)


def switched_off() -> bool:
    """By W&B's own variables, the older of which Transformers still reads."""
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return disabled or os.environ.get("WANDB_MODE") == "disabled"


def quieten() -> None:
    """Before wandb is imported, which reads these once."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits 20 s at exit for a host that does not answer
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", "10")  # seconds; tables and artifacts of an online run ask the host


def wants_online(wandb: ModuleType, mode: str, say: Say) -> bool:
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


def online(begin: Callable[..., Run], wandb_dir: Path, resume_id: str | None, say: Say) -> Run | None:
    """None where the host does not answer, or does not let us in."""
    before = set(wandb_dir.iterdir())
    try:
        return begin(mode="online", id=resume_id, resume="allow" if resume_id else None)
    except Exception as error:
        say(f"W&B cannot be reached ({first_line(error)}); tracking offline")
        for left in set(wandb_dir.glob("run-*")) - before:
            shutil.rmtree(left, ignore_errors=True)
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m isoforward.show.wandb_tracker", description="Makes W&B dashboards."
    )
    parser.add_argument("what", choices=("workspace", "report"))
    parser.add_argument("--entity", required=True, help="the W&B user or team")
    parser.add_argument("--project", required=True)
    parser.add_argument("--experiment", metavar="QUESTION", help="a report of this question's runs, such as kv_cache")
    asked = parser.parse_args(argv)
    if asked.experiment and asked.what != "report":
        parser.error("--experiment goes with report")
    quieten()
    from isoforward.show.dashboards import report, workspace

    try:
        made = workspace if asked.what == "workspace" else partial(report, experiment=asked.experiment)
        print(save(made(asked.entity, asked.project), f"{asked.what} of {asked.entity}/{asked.project}"))
    except Refusal as refusal:
        to_stderr(f"error: {refusal}")
        return refusal.exit_code
    return 0


def save(dashboard: Workspace | Report, what: str) -> str:
    """Where it is to be seen."""
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            raise BadInput("W&B knows no key: run wandb login, or set WANDB_API_KEY")
        return str(dashboard.save().url)
    except Refusal:
        raise
    except Exception as error:
        raise StorageFailed(f"W&B did not take the {what}: {first_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
