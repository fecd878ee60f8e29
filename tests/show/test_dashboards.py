"""Dashboards as code: what they are made of, against kept examples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from isoforward.show.panels import CHARTS, summary
from tests.show.planted import PLANTED

dashboards = pytest.importorskip("isoforward.show.dashboards")
pytest.importorskip("wandb_workspaces")
EXPECTED = Path(__file__).parent / "expected"
MADE = {
    "workspace": lambda: dashboards.workspace("acme", "gpt"),
    "report": lambda: dashboards.report("acme", "gpt"),
    "question": lambda: dashboards.report("acme", "gpt", "kv_cache"),
}


def without_ids(specification: Any) -> Any:
    """Panels and run sets carry identifiers drawn at random."""
    if isinstance(specification, dict):
        return {
            key: without_ids(value)
            for key, value in specification.items()
            if key != "__id__" and not (key == "id" and isinstance(value, str))
        }
    return [without_ids(one) for one in specification] if isinstance(specification, list) else specification


@pytest.mark.parametrize("what", list(MADE))
def test_dashboards_are_the_kept_ones(what: str) -> None:
    made = MADE[what]()._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    kept = json.loads((EXPECTED / f"{what}.json").read_text())
    assert without_ids(json.loads(json.dumps(made))) == kept


def test_dashboards_show_what_runs_log() -> None:
    specification = json.dumps(dashboards.workspace("acme", "gpt")._spec)
    for chart in CHARTS:
        assert f'"charts/{chart.key}_table"' in specification
    logged = {*summary(PLANTED), "loss", "validation_loss", "tokens_per_s", "memory_bytes", "flops_per_s", "mfu"}
    wanted = set(re.findall(r'"((?:summary:)?(?:phase|training|inference)/[\w/]+)"', specification))
    unknown = {name for name in wanted if name.removeprefix("summary:") not in logged}
    assert {name for name in unknown if not re.fullmatch(r"phase/\w+(_share|/peak_bytes)", name)} == set()


def test_a_questions_report_shows_its_runs_alone() -> None:
    specification = json.dumps(dashboards.report("acme", "gpt", "kv_cache")._to_model().model_dump(mode="json"))
    assert '"tags"' in specification and '"kv_cache"' in specification
    assert "jobType" not in specification
