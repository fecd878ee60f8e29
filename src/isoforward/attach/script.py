"""`isoforward attach train_script.py [its arguments]`: the script runs as it is, and its steps are timed by phase."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType

from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import Sampling
from isoforward.base.stopwatch import Clock
from isoforward.show.phases import Phases

USAGE = """usage: isoforward attach SCRIPT [argument ...]

Runs a training script of yours as Python would, with these arguments, and times the phases of its optimizer steps:
data, transfer, forward, loss, backward, clipping, optimizer, and validation. Then the forward alone, as inference runs
it. Nothing in the script is changed; results.jsonl and report.html are written to runs/<date>_<time>_attach."""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(USAGE)
        return 0 if arguments else 2
    script, *rest = arguments
    if not Path(script).is_file():
        print(f"error: {script} is not a file: name the script that trains, then its arguments", file=sys.stderr)
        return 2
    run = Path("runs").absolute() / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_attach"
    try:
        run_script(script, rest, run)
    except BaseException:
        sys.excepthook = partial(without_our_frames, sys.excepthook, str(Path(script).absolute()))
        raise
    return 0


def without_our_frames(
    shows: Callable[..., object], script: str, kind: type[BaseException], error: BaseException, trace: TracebackType
) -> None:
    """So that a traceback is the one that Python prints without us."""
    frame: TracebackType | None = trace
    while frame is not None and frame.tb_frame.f_code.co_filename != script:
        frame = frame.tb_next
    shows(kind, error.with_traceback(frame), frame)


def run_script(script: str, arguments: Sequence[str], run: Path, *, clock: Clock | None = None) -> Phases:
    """Whatever the script raises is raised here, after the rows of its steps until then were written to `run`."""
    measurement = Measurement(Sampling(), clock=clock, validation_by_mode=True)
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).absolute().parent))
    measurement.start()
    ended = False
    try:
        runpy.run_path(str(Path(script).absolute()), run_name="__main__")  # as Python names it in __file__
        ended = True
    except SystemExit as error:
        ended = error.code in (None, 0)
        raise
    finally:
        sys.argv, sys.path[:] = argv, path
        command = f"isoforward attach {Path(script).name}"
        phases = measurement.finish(run / "results.jsonl", ended=ended, command=command)
    return phases


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
