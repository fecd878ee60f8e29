"""Which checkpoint is gone on from, and which config must be the same."""

import dataclasses
import signal
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are no package of the lock
from rich.console import Console

from isoforward.base.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from isoforward.base.dependent_keys import flat
from isoforward.base.errors import BadInput, Integrity
from isoforward.train.stopping import StopOnSignal, read_yaml, refuse_another, to_resume

QUIET = Console(quiet=True)


def began(directory: Path, config: TrainConfig) -> TrainConfig:
    directory.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, run_dir=str(directory))
    (directory / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return config


def resuming(what: str, run_dir: Path) -> TrainConfig:
    return TrainConfig(run_dir=str(run_dir), trainer=TrainerConfig(resume=what))


def test_a_run_goes_on_that_began_before_a_key_was_there(tmp_path: Path) -> None:
    config = began(tmp_path, TrainConfig(optim=OptimConfig(name="muon")))
    kept = tmp_path / "config.yaml"
    before = yaml.safe_load(kept.read_text())
    del before["adapter"], before["optim"]["muon_lr"]
    kept.write_text(yaml.safe_dump(before))
    refuse_another(config)
    with pytest.raises(BadInput, match=r"optim\.muon_lr=0\.5 \(began with 0\.02\)"):
        refuse_another(dataclasses.replace(config, optim=OptimConfig(name="muon", muon_lr=0.5)))


def test_a_run_goes_on_that_began_with_keys_without_effect(tmp_path: Path) -> None:
    """Case: earlier versions took a path of another source, and wrote down other sizes than the checkpoint's."""
    path = DataConfig(source="synthetic", path="a.txt")
    loaded = ModelConfig(source="hf", path="weights", layers=1, rope_scaling={"type": "linear", "factor": 2.0})
    config = began(tmp_path, TrainConfig(data=path, model=loaded))
    now = dataclasses.replace(
        config, data=DataConfig(source="synthetic"), model=ModelConfig(source="hf", path="weights")
    )
    refuse_another(now)
    with pytest.raises(BadInput, match=r"model\.path=other \(began with weights\)"):
        refuse_another(dataclasses.replace(now, model=ModelConfig(source="hf", path="other")))


def test_the_same_config_goes_on_and_another_is_named_key_by_key(tmp_path: Path) -> None:
    config = began(tmp_path, TrainConfig())
    refuse_another(config)
    other = dataclasses.replace(config, seed=1, optim=OptimConfig(lr=0.5))
    with pytest.raises(BadInput, match=r"optim\.lr=0\.5 \(began with 0\.003\), seed=1 \(began with 1234\)"):
        refuse_another(other)


def test_a_directory_without_a_run_cannot_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.yaml is missing"):
        refuse_another(TrainConfig(run_dir=str(tmp_path)))


def test_nothing_is_resumed_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert to_resume(TrainConfig(run_dir=str(tmp_path)), QUIET) is None
    assert to_resume(resuming("auto", tmp_path / "new"), QUIET) is None


@pytest.mark.parametrize(("there", "why"), [(False, "does not exist"), (True, "holds no good checkpoint")])
def test_what_cannot_be_resumed_says_why(there: bool, why: str, tmp_path: Path) -> None:
    if there:
        (tmp_path / "run").mkdir()
    with pytest.raises(BadInput, match=why):
        to_resume(resuming(str(tmp_path / "run"), tmp_path / "new"), QUIET)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &x [1]\nb: *x\n", "alias"),
        ("a: [", "damaged"),
        ("- 1\n", "holds no configuration"),
        ("!!python/name:os x", "damaged"),
    ],
)
def test_a_config_file_that_is_none_is_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Integrity, match=why):
        read_yaml(tmp_path / "config.yaml")


def test_a_tree_of_settings_is_flattened_to_the_keys_that_are_typed() -> None:
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [2]}) == {"a.b": 1, "a.c.d": None, "e": [2]}


def test_the_first_signal_is_noted_and_handlers_are_put_back_where_none_came() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopOnSignal(validate_every=10).listening():
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    stopping = StopOnSignal(validate_every=10)
    with stopping.listening():
        signal.raise_signal(signal.SIGTERM)
        assert stopping.received == signal.SIGTERM
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, signal.default_int_handler)
