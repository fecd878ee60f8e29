"""Who has a directory, and when it is done."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from isoforward.app.command_line import run
from isoforward.app.run_directory import claim
from isoforward.app.scripts import scripts
from isoforward.base.config import TrainConfig
from isoforward.base.errors import BadInput, NonFinite, Stopped
from isoforward.base.storage import DONE


def test_a_directory_is_one_runs_alone_and_marked_once_it_is_done(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with claim(config) as directory:
        with pytest.raises(BadInput, match="in use by another run"), claim(config):
            pytest.fail("two have it")
        assert not (directory / DONE).exists()
    assert (directory / DONE).read_text() == hashlib.sha256((directory / "config.yaml").read_bytes()).hexdigest()
    with pytest.raises(BadInput, match="holds a run already"), claim(config):
        pytest.fail("it was taken again")


def test_runs_that_begin_in_the_same_second_have_a_directory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(run_dir="runs/2026-11-27_21-53-43_train")
    with claim(config) as first, claim(config) as second:
        assert (first, second) == (Path(config.run_dir), Path(f"{config.run_dir}-2"))
    with claim(config) as third:
        assert third == Path(f"{config.run_dir}-3")
        assert f"run_dir: {third}" in (third / "config.yaml").read_text()
    with pytest.raises(BadInput, match="in use"), claim(config, resuming=True), claim(config, resuming=True):
        pytest.fail("two go on with it")


def test_ctrl_c_says_what_became_of_the_directory(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with pytest.raises(Stopped, match=r"stopped before it was done; run_dir=.* is free again"), claim(config):
        raise KeyboardInterrupt
    with pytest.raises(Stopped, match="run has what was written until then") as stopped, claim(config) as directory:
        (directory / "results.jsonl").touch()
        raise KeyboardInterrupt
    assert stopped.value.exit_code == 130


def test_a_directory_that_holds_something_else_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "hamlet.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()  # of one that was killed before it began
    with claim(TrainConfig(run_dir="empty")):
        pass
    for run_dir, said in (("books", "run_dir=books holds hamlet.txt and no run"), ("", "run_dir= names no directory")):
        with pytest.raises(BadInput, match=said), claim(TrainConfig(run_dir=run_dir)):
            pytest.fail("it was taken")
        main = lambda config: pytest.fail("it ran")  # noqa: E731
        assert run(main, TrainConfig, [f"run_dir={run_dir}"], script=scripts()["train"]) == 2
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["books", "hamlet.txt", "empty", ".lock", "config.yaml", DONE]
    )


def test_a_run_that_was_refused_leaves_its_name_free(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with pytest.raises(BadInput, match="no such model"), claim(config):
        raise BadInput("no such model")
    with pytest.raises(BadInput, match="in the midst"), claim(config) as directory:
        (directory / "results.jsonl").touch()
        raise BadInput("in the midst")
    with pytest.raises(BadInput, match="holds a run already"), claim(config):
        pytest.fail("what was measured would be written over")


def test_a_run_that_fails_is_not_done_and_can_be_gone_on_with(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with pytest.raises(NonFinite), claim(config):
        raise NonFinite("no")
    assert not (tmp_path / "run" / DONE).exists()
    with claim(config, resuming=True):
        pass
    assert (tmp_path / "run" / DONE).exists()
