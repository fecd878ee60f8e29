"""Sweeps: each case in a process and a directory of its own, so that its death is a row and not the sweep's end.

A sweep that did not finish is gone on with when the same command is typed again: finished cases are left as they are,
training that was cut off is resumed, anything else that was is set aside and done anew.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from isoforward.base.config import TrainConfig
from isoforward.base.errors import Refusal, StorageFailed
from isoforward.base.locks import is_locked
from isoforward.base.storage import DONE, sha256_of, write_text
from isoforward.base.subprocesses import Failed, run_isolated

COMMAND = ".command"  # in the directory of a sweep: the overrides it was started with


class InDirectory(Protocol):
    """The config of a command that writes into a directory of its own."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    @property
    def run_dir(self) -> str: ...


Config = TypeVar("Config", bound=InDirectory)


def directory_for(name: str, overrides: Sequence[str]) -> Path:
    """That of the newest sweep of the same command that did not finish and is not running, else a new one."""
    runs = Path("runs")
    for command in sorted(runs.glob(f"*_{name}_sweep/{COMMAND}"), key=lambda path: path.stat().st_mtime, reverse=True):
        sweep = command.parent
        same = command.read_text(encoding="utf-8") == "\n".join(overrides)
        if same and not (sweep / DONE).exists() and not any(is_locked(lock) for lock in sweep.glob("*/.lock")):
            return sweep
    return runs / time.strftime(f"%Y-%m-%d_%H-%M-%S_{name}_sweep")


def start(sweep: Path, overrides: Sequence[str]) -> None:
    write_text(sweep / COMMAND, "\n".join(overrides))


def finish(sweep: Path) -> None:
    write_text(sweep / DONE, "")


def run_case(main: Callable[[Config], None], config: Config, script: Path, overrides: Sequence[str]) -> tuple[int, str]:
    """The exit code of one case, and why where it is not 0."""
    directory = Path(config.run_dir)
    if (directory / DONE).is_file() and (directory / DONE).read_text() == sha256_of(directory / "config.yaml"):
        print(f"{directory} is done already: left as it is")
        return 0, ""
    if (directory / "config.yaml").exists():
        if isinstance(config, TrainConfig) and any(directory.glob("checkpoints/*.ckpt")):
            config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, resume=str(directory)))
        else:
            set_aside(directory)
    elif (directory / "results.jsonl").exists():  # it died before it began, and `failed` said so
        set_aside(directory)
    outcome = run_isolated(run_here, main, config, script, sys.argv)
    if not isinstance(outcome, Failed):
        code, reason = outcome
        if code in (0, Refusal.exit_code):
            return code, reason
        return code, failed(config, reason, overrides)
    return 1, failed(config, outcome.reason, overrides)


def failed(config: InDirectory, reason: str, overrides: Sequence[str]) -> str:
    from isoforward.base.results import Row, write  # loads numpy, which a mistake in a command need not wait for

    row = Row(
        experiment="sweep",
        life="training" if isinstance(config, TrainConfig) else "inference",
        phase="run",
        quantity="time",
        per="run",
        value=None,
        provenance="unavailable",
        reason=f"failed: {reason}",
        conditions={"change": " ".join(overrides)},
    )
    write(Path(config.run_dir) / "results.jsonl", [row])
    return reason


def set_aside(directory: Path) -> None:
    number = sum(1 for _ in directory.parent.glob(f"{directory.name}.failed*")) + 1
    try:
        directory.rename(directory.with_name(f"{directory.name}.failed{number}"))
    except OSError as error:
        raise StorageFailed(f"{directory} could not be set aside: {error.strerror}") from error


def run_here(main: Callable[[Config], None], config: Config, script: Path, arguments: list[str]) -> tuple[int, str]:
    """In the process of the case: its exit code, and why where it is not 0."""
    sys.argv = arguments
    sys.path.insert(0, str(script.parent))  # under a launcher, too, questions find each other by name
    try:
        main(config)
    except Refusal as refusal:
        return refusal.exit_code, str(refusal)
    return 0, ""
