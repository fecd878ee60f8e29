"""How rows are told: what a run is grouped with, and what a prediction is told without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from isoforward.app.telling import group_of
from isoforward.base.config import ExperimentConfig, TrainConfig
from isoforward.formats.export import export
from isoforward.model.gpt import GPT
from tests.conftest import tiny

CONFIG = ExperimentConfig()


def test_all_that_is_asked_of_one_model_is_grouped_with_its_training(tmp_path: Path) -> None:
    export(GPT(tiny(layers=1)), tmp_path / "trained" / "export", tokenizer=None)
    asked = replace(CONFIG, checkpoint=str(tmp_path / "trained"))
    assert group_of(asked, tmp_path / "asked") == "trained"
    assert group_of(TrainConfig(), tmp_path / "trained") == "trained"
    assert group_of(CONFIG, tmp_path / "asked") == "asked"
