"""Sweeps whose cases really die, on a command that only leaves a mark."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from isoforward.app.command_line import run
from isoforward.app.run_directory import claim
from isoforward.app.scripts import scripts
from isoforward.app.sweeps import directory_for
from isoforward.base.config import TrainConfig
from isoforward.base.errors import NonFinite
from isoforward.base.results import read
from isoforward.base.storage import DONE

TRAIN = scripts()["train"]
COMMAND = ["-m", "seed=1,2,3,4,5"]


def act(config: TrainConfig) -> None:
    """Seeds fail each in its own way, until a file says that they are mended."""
    if config.seed == 6 and not Path("mended").exists():
        raise MemoryError("no room for the text")
    with claim(config) as directory:
        with (directory / "ran").open("a") as file:
            file.write(f"{config.seed}\n")
        if Path("mended").exists():
            return
        if config.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if config.seed == 3:
            raise MemoryError("no room for the case")
        if config.seed == 4:
            raise NonFinite("the gradient is not finite")
        if config.seed == 5 and Path("whole").exists():
            os.kill(os.getppid(), signal.SIGKILL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reason(case: Path) -> str:
    (row,) = read(case / "results.jsonl").rows
    assert row.provenance == "unavailable"
    return str(row.reason)


@pytest.mark.usefixtures("processes_start_at_once")
def test_rows_24_and_25_a_case_that_dies_is_a_row_and_what_is_finished_is_never_done_again(here: Path) -> None:
    assert run(act, TrainConfig, COMMAND, script=TRAIN) != 0
    (sweep,) = here.glob("runs/*_train_sweep")
    assert [case.name for case in sorted(sweep.iterdir()) if (case / DONE).exists()] == ["0", "4"]
    assert reason(sweep / "1") == "failed: killed by SIGKILL: the system does so where memory runs out"
    assert reason(sweep / "2") == "failed: out of memory (MemoryError: no room for the case)"
    assert reason(sweep / "3") == "failed: the gradient is not finite"
    assert read(sweep / "1" / "results.jsonl").rows[0].conditions == {"change": "seed=2"}

    (here / "mended").touch()
    before = (sweep / "0" / "config.yaml").stat().st_mtime_ns
    assert run(act, TrainConfig, COMMAND, script=TRAIN) == 0
    assert list(here.glob("runs/*")) == [sweep]
    assert [(sweep / str(case) / "ran").read_text() for case in range(5)] == [f"{seed}\n" for seed in range(1, 6)]
    assert (sweep / "0" / "config.yaml").stat().st_mtime_ns == before
    assert reason(sweep / "1.failed1").startswith("failed: killed")  # set aside, not lost
    assert directory_for("train", COMMAND[1:]) != sweep  # it is finished: the same command is another sweep


@pytest.mark.usefixtures("processes_start_at_once")
def test_a_case_that_died_before_it_began_is_done_anew(here: Path) -> None:
    command = ["-m", "seed=6"]
    assert run(act, TrainConfig, command, script=TRAIN) != 0
    (here / "mended").touch()
    assert run(act, TrainConfig, command, script=TRAIN) == 0
    (sweep,) = here.glob("runs/*_train_sweep")
    assert (sweep / "0" / DONE).exists() and "no room for the text" in reason(sweep / "0.failed1")


def test_row_25_a_sweep_killed_in_a_case_goes_on_with_it_where_it_was(here: Path) -> None:
    (here / "whole").touch()
    command = ["-m", "seed=1,5"]
    if (child := os.fork()) == 0:
        os._exit(run(act, TrainConfig, command, script=TRAIN))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (here / "mended").touch()
    assert run(act, TrainConfig, command, script=TRAIN) == 0
    (sweep,) = here.glob("runs/*_train_sweep")
    assert [(sweep / str(case) / "ran").read_text() for case in range(2)] == ["1\n", "5\n"]


def test_a_sweep_of_another_command_or_one_that_runs_is_not_gone_on_with(here: Path) -> None:
    sweep = here / "runs" / "2026-01-01_00-00-00_train_sweep"
    (sweep / "0").mkdir(parents=True)
    (sweep / ".command").write_text("seed=1,2")
    assert directory_for("train", ["seed=1,2"]) == sweep.relative_to(here)
    assert directory_for("train", ["seed=1,3"]) != sweep.relative_to(here)
    config = TrainConfig(run_dir=str(sweep / "0"))
    with claim(config):
        assert directory_for("train", ["seed=1,2"]) != sweep.relative_to(here)
