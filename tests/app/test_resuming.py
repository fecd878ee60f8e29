"""A run is gone on with by naming it alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from isoforward.app import resuming
from isoforward.app.resuming import as_it_began
from isoforward.base.config import DataConfig, OptimConfig, TrackingConfig, TrainConfig, TrainerConfig
from isoforward.base.errors import BadInput
from isoforward.train.stopping import refuse_another


def typing(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    class Typed:
        initialized = staticmethod(lambda: True)
        get = staticmethod(lambda: OmegaConf.create({"overrides": {"task": list(overrides)}}))

    monkeypatch.setattr(resuming, "HydraConfig", Typed)


def begun(directory: Path) -> TrainConfig:
    directory.mkdir()
    config = TrainConfig(
        run_dir=str(directory),
        data=DataConfig(length=16),
        optim=OptimConfig(lr=0.125),
        trainer=TrainerConfig(max_steps=7),
        tracking=TrackingConfig(mode="none"),
    )
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return config


def test_it_goes_on_as_it_began_with_what_was_typed_and_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = begun(tmp_path / "run")
    typing(monkeypatch, f"trainer.resume={tmp_path}/run", "trainer.max_time=2h")
    trainer = TrainerConfig(resume=f"{tmp_path}/run", max_time="2h")
    found = as_it_began(TrainConfig(run_dir=before.run_dir, trainer=trainer))
    wanted = replace(before, trainer=replace(before.trainer, resume=trainer.resume, max_time="2h"))
    assert asdict(found) == asdict(wanted)
    refuse_another(found)


def test_other_keys_must_agree_and_the_refusal_says_that_none_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = begun(tmp_path / "run")
    typing(monkeypatch, f"trainer.resume={tmp_path}/run", "seed=3")
    typed = replace(before, seed=3)
    assert as_it_began(typed) is typed
    with pytest.raises(BadInput, match=r"seed=3 \(began with 1234\).*it goes on as it began"):
        refuse_another(typed)
