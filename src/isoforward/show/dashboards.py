"""Dashboards as code, through wandb-workspaces: the saved view of both lives, and a report of it or of one question."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from isoforward.base.errors import BadInput
from isoforward.base.vocabulary import TRAINING
from isoforward.show.panels import CHARTS, JOB_TYPES, Chart

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace


def designs() -> tuple[ModuleType, ModuleType]:
    """`wandb_workspaces.workspaces` and `wandb_workspaces.reports.v2`."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise BadInput(
            "dashboards need the package wandb-workspaces: pip install 'isoforward[wandb-workspaces]'"
        ) from None
    return workspaces, reports


def sections() -> dict[str, list[object]]:
    """Panels by the question that they answer; the same for the workspace and the report."""
    _, reports = designs()

    def line(title: str, *metrics: str, **how: object) -> object:
        return reports.LinePlot(title=title, x="step", y=list(metrics), **how)

    def bar(title: str, quantity: str, phases: Sequence[str]) -> object:
        return reports.BarPlot(title=title, metrics=[f"phase/{phase}/{quantity}" for phase in phases])

    drawn = {chart.key: chart for chart in CHARTS}
    shares = [f"phase/{phase}_share" for phase in TRAINING]
    lives = (*TRAINING, "frozen_forward", "prefill", "decode")
    return {
        "Where a training step goes": [
            line("share of each phase", *shares, plot_type="pct-area"),
            line("loss (nats per token)", "loss", "validation_loss"),
            line("tokens per second", "tokens_per_s"),
            line("memory (bytes)", "memory_bytes"),
            line("FLOP per second, model convention", "flops_per_s"),
            line("MFU", "mfu"),
        ],
        "Training against inference": [
            custom(drawn["two_lives"]),
            bar("time per token (s)", "time_per_token_s", lives),
            reports.ScalarChart(title="a training step against its forward, in time", metric="training/time_ratio"),
            reports.ScalarChart(title="in FLOPs", metric="training/flops_ratio"),
            reports.ScalarChart(title="in memory", metric="training/memory_ratio"),
            reports.ScalarChart(title="a decoded token against a trained one", metric="inference/decode_ratio"),
        ],
        "The ladder from inference to training": [custom(drawn["ladder"])],
        "The memory ledger": [custom(drawn["ledger"]), bar("peak of each phase (bytes)", "peak_bytes", lives)],
        "With a KV cache, and without": [custom(drawn["cache"])],
        "Break-even": [custom(drawn["break_even"])],
        "Report": [reports.MediaBrowser(title="report.html", media_keys=["report"])],
    }


def custom(chart: Chart) -> object:
    _, reports = designs()
    return reports.CustomChart(
        query={"summaryTable": {"tableKey": f"charts/{chart.key}_table"}},
        chart_name=chart.vega,
        chart_fields=chart.fields,
        chart_strings=chart.strings,
    )


def workspace(entity: str, project: str) -> Workspace:
    """The view "two lives" as a `wandb_workspaces.workspaces.Workspace`, not saved yet."""
    workspaces, _ = designs()
    from wandb_workspaces.expr import Metric

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="two lives",
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in arranged(sections()).items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step"),
        runset_settings=workspaces.RunsetSettings(groupby=[Metric("Group"), Metric("JobType")]),
    )


def report(entity: str, project: str, experiment: str | None = None) -> Report:
    """A `wandb_workspaces.reports.v2.Report`: the same panels, or what one question's runs found."""
    _, reports = designs()
    from wandb_workspaces.expr import And, Metric, Tags

    if experiment is None:
        runs = {kind: And(Metric("JobType") == kind) for kind in JOB_TYPES}
        parts = arranged(sections())
    else:
        runs = {experiment: And(Tags().isin([experiment]))}
        page = reports.MediaBrowser(title="report.html", media_keys=["report"])
        rows = reports.WeavePanelSummaryTable(table_name="rows")
        parts = arranged({"Answer": [page, rows, *map(custom, CHARTS)]})
    blocks: list[object] = [reports.TableOfContents()]
    for name, panels in parts.items():
        runsets = [reports.Runset(name=kind, filters=chosen) for kind, chosen in runs.items()]
        blocks += [reports.H2(name), reports.PanelGrid(runsets=runsets, panels=panels)]
    return reports.Report(
        entity=entity,
        project=project,
        title="One forward, two lives" if experiment is None else experiment.replace("_", " "),
        description="What training adds to the forward pass, and what serving costs.",
        blocks=blocks,
    )


def arranged(parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Three panels abreast."""
    _, reports = designs()
    for panels in parts.values():
        for place, panel in enumerate(panels):
            panel.layout = reports.Layout(x=8 * (place % 3), y=6 * (place // 3), w=8, h=6)
    return parts
