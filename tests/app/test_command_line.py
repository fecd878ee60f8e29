"""Who has a directory, and what the program says and exits with."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from isoforward.app.command_line import claim, run
from isoforward.app.scripts import scripts
from isoforward.base.config import GenerateConfig, TrainConfig
from isoforward.base.errors import BadInput, Integrity, NonFinite, Stopped, StorageFailed
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
    assert len(capsys.readouterr().err.splitlines()) == (code != 130)
