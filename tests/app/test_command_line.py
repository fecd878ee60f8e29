"""What the program says and exits with."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from isoforward.app.command_line import run
from isoforward.app.scripts import scripts
from isoforward.base.config import GenerateConfig, TrainConfig
from isoforward.base.errors import BadInput, Integrity, NonFinite, Stopped, StorageFailed


def test_a_sweep_takes_no_run_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(lambda config: None, TrainConfig, ["-m", "seed=1", "run_dir=x"], script=scripts()["train"]) == 2
    assert "run_dir: in a sweep each case has its own" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr=null", "error: optim.lr=null: it takes a value; leave the key out for its default"),
        ("~optim.lr", "error: ~optim.lr: no key of this group can be taken out; leave it away for its default"),
        (
            "adapter.targets=none",
            "error: adapter.targets takes a list; write 'adapter.targets=[A]' or 'adapter.targets=[A,B]'",
        ),
    ],
)
def test_what_no_key_takes_is_said_in_words_of_the_command(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda _: None, TrainConfig, [override], script=scripts()["train"]) == 2
    assert capsys.readouterr().err.splitlines() == [said]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (BadInput("b"), 2),
        (Integrity("i"), 3),
        (NonFinite("n"), 4),
        (StorageFailed("s"), 5),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (Stopped(15, "stopped"), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_end_has_its_code_and_no_traceback(
    raised: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(config: GenerateConfig) -> None:
        raise raised

    assert run(end, GenerateConfig, [], script=scripts()["generate"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "tiny"], "--model: keys are written model=tiny"),
        (["--optim.lr=3"], "--optim.lr: keys are written optim.lr=3"),
        (["seed=1", "--max-steps", "trainer.devices=1"], "--max-steps: keys are written max_steps=VALUE"),
        (["optim.lr=1e-3,3e-3"], "optim.lr=1e-3,3e-3: several values are a sweep; write -m in front of the keys"),
    ],
)
def test_habits_of_other_tools_are_told_how_it_is_done_here(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda config: pytest.fail("it ran"), TrainConfig, arguments, script=scripts()["train"]) == 2
    assert says in capsys.readouterr().err


def test_help_may_stand_between_keys_and_the_version_is_this_projects(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        arguments = ["seed=7", "--help", "model.layers=2"]
        run(lambda config: pytest.fail("it ran"), TrainConfig, arguments, script=scripts()["train"])
    assert "seed: 7" in capsys.readouterr().out
    assert run(lambda config: pytest.fail("it ran"), TrainConfig, ["--version"], script=scripts()["train"]) == 0
    assert capsys.readouterr().out.startswith("isoforward ")


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(lambda config: pytest.fail("it ran"), TrainConfig, ["--help"], script=scripts()["train"])
    prose = capsys.readouterr().out.partition("Keys (key=value)")[0].splitlines()
    assert max(len(line) for line in prose if not line.startswith("    ")) <= 80


def test_who_reads_no_further_is_not_told_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: TrainConfig) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("isoforward.app.command_line.write_no_more", lambda: None)
    assert run(main, TrainConfig, [], script=scripts()["train"]) == 130
    assert capsys.readouterr().err == ""
