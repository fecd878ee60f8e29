"""Who has the directory of a run, and what marks it as a run and as done."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from isoforward.app.sweeps import InDirectory
from isoforward.base.errors import BadInput, Stopped
from isoforward.base.locks import locked
from isoforward.base.storage import DONE, remove, sha256_of, write_text

LOCK = ".lock"
BY_THE_CLOCK = re.compile(r"runs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\w+")
NUMBERS = range(2, 100)


@contextmanager
def claim(config: InDirectory, *, resuming: bool = False) -> Iterator[Path]:
    """The run's directory, this process' alone while it runs, with the resolved config in it; marked once all is done.

    A directory that holds a run is taken only to go on with it. One refused before it wrote anything is free again.
    """
    refuse_what_is_no_run(config.run_dir)
    with own(config.run_dir, resuming=resuming) as directory:
        kept = directory / "config.yaml"
        if not resuming:
            resolved = OmegaConf.merge(OmegaConf.structured(config), {"run_dir": str(directory)})
            write_text(kept, OmegaConf.to_yaml(resolved))
        remove(directory / DONE)
        try:
            yield directory
        except (BadInput, KeyboardInterrupt) as error:
            nothing = not resuming and {path.name for path in directory.iterdir()} <= {kept.name, LOCK}
            if nothing:
                remove(kept)
            if isinstance(error, BadInput):
                raise
            left = f"run_dir={directory} is free again" if nothing else f"{directory} has what was written until then"
            raise Stopped(signal.SIGINT, f"stopped before it was done; {left}") from None
        write_text(directory / DONE, sha256_of(kept))


def refuse_what_is_no_run(run_dir: str) -> None:
    """A directory of somebody else's. Hidden files can be of a run that was refused, or killed before it began."""
    if not run_dir.strip():
        raise BadInput("run_dir= names no directory; write run_dir=runs/NAME, or leave it out")
    directory = Path(run_dir)
    if (directory / "config.yaml").exists() or not (directory.is_dir() and os.access(directory, os.R_OK)):
        return
    if found := sorted(path.name for path in directory.iterdir() if not path.name.startswith(".")):
        raise BadInput(f"run_dir={run_dir} holds {found[0]} and no run; choose a directory that is new or empty")


@contextmanager
def own(run_dir: str, *, resuming: bool) -> Iterator[Path]:
    """`run_dir`, locked. One named by the clock gets a number where another run began in the same second."""
    more = NUMBERS if BY_THE_CLOCK.fullmatch(run_dir) and not resuming else range(0)
    names = [Path(run_dir), *(Path(f"{run_dir}-{number}") for number in more)]
    for directory in names:
        with ExitStack() as held:
            try:
                held.enter_context(locked(directory / LOCK, wait=False, called=f"run_dir={directory}"))
                if not resuming and (directory / "config.yaml").exists():
                    raise BadInput(f"run_dir={directory} holds a run already; choose another run_dir")
            except BadInput:
                if directory == names[-1]:
                    raise
                continue
            yield directory
            return
