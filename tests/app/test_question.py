"""What an experiment measures follows from its config; what it cannot measure is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isoforward.app.question import FRESH_VOCABULARY, Asking, at_most, case_of, wrapped_case
from isoforward.base.config import DataConfig, ExperimentConfig, MeasureConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Verdict, read, row_of
from isoforward.formats.export import export
from isoforward.model.gpt import GPT
from tests.conftest import tiny

CONFIG = ExperimentConfig(
    model=ModelConfig(layers=1, heads=2, width=16, context=32), data=DataConfig(batch=2, length=16), precision="fp32"
)


def test_fresh_weights_have_a_vocabulary_and_what_is_asked_is_in_the_case() -> None:
    case = case_of(replace(CONFIG, seed=7), "layers", rows=())
    assert case.model.vocab == FRESH_VOCABULARY
    assert (case.experiment, case.batch, case.length, case.seed, case.export) == ("layers", 2, 16, 7, None)


def test_a_checkpoint_gives_the_model_instead(tmp_path: Path) -> None:
    export(GPT(tiny(layers=1)), tmp_path / "export", tokenizer=None)
    case = case_of(replace(CONFIG, checkpoint=str(tmp_path)), "layers", rows=())
    assert case.export == str(tmp_path / "export")
    assert case.model == tiny(layers=1)


def test_a_length_beyond_the_context_is_refused() -> None:
    with pytest.raises(BadInput, match=r"data\.length=64 is longer .* write data\.length=32"):
        case_of(replace(CONFIG, data=DataConfig(batch=2, length=64)), "layers", rows=())


def test_an_experiment_that_takes_our_forward_apart_says_so(tmp_path: Path) -> None:
    config = ExperimentConfig(model=ModelConfig(source="transformers", path=str(tmp_path)))
    with pytest.raises(BadInput, match="phase_costs"):
        case_of(config, "layers")
    with pytest.raises(BadInput, match=r"config\.json"):
        wrapped_case(config, "phase_costs")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (MeasureConfig(repeats=7), ", 7 samples of each"),
        (MeasureConfig(budget=20, processes=3), ", 60.0 s of timing at most (measure.budget)"),
    ],
)
def test_what_measuring_takes_at_most_is_said(plan: MeasureConfig, said: str) -> None:
    assert at_most(plan) == said


def test_rows_hold_where_they_were_noted_and_nothing_is_written_before_them(tmp_path: Path) -> None:
    run = Asking(tmp_path)
    run.note()
    assert not run.results.exists()
    row = row_of("layers", {"life": "training", "phase": "run", "per": "run"}, quantity="memory", value=1.0)
    run.add([row])
    run.add((), Verdict(experiment="layers", trusted=True))
    found = read(run.results)
    (where,) = found.environments
    assert [found.rows[0].environment, found.verdicts[0].environment] == [where, where]
