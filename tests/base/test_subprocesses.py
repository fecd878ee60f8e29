from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isoforward.base.errors import BadInput
from isoforward.base.subprocesses import Child, Failed, run_isolated


def double(number: int) -> dict[str, int]:
    return {"twice": 2 * number, "process": os.getpid()}


def chatter() -> str:
    print("progress on standard output")
    os.write(1, b"and below Python\n")
    return "the result"


def torch_threads() -> dict[str, Any]:
    import torch

    return {"torch": torch.get_num_threads(), "openmp": os.environ["OMP_NUM_THREADS"]}


def environment(name: str) -> str:
    return os.environ[name]


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def mistake(message: str) -> None:
    raise BadInput(message)


def crash() -> None:
    raise RuntimeError("the first line\nand the second")


def leave(code: int) -> None:
    os._exit(code)


def not_picklable() -> object:
    return (letter for letter in "")


class Unreadable:
    """Pickles, and cannot be had back."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return importlib.import_module, ("isoforward.nowhere",)


@dataclass(frozen=True, kw_only=True)
class Point:
    at: int
    beside: list[Path | None]


SCRIPT = """
from dataclasses import dataclass
from isoforward.base.subprocesses import run_isolated

@dataclass(frozen=True)
class Twice:
    number: int

FACTOR = 2

def double(number):
    return Twice(FACTOR * number)

found = run_isolated(double, 21)
print(found, type(found) is Twice)
"""


def allocate(size: int) -> int:
    return len(bytearray(size))


def allocate_tensor(size: int) -> int:
    import torch

    return torch.empty(size, dtype=torch.uint8).numel()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def write_down_its_end(path: str) -> None:
    Path(f"{path}.started").write_text(str(os.getpid()))
    end = "of its own accord"
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        end = "interrupted"
        raise
    finally:
        Path(path).write_text(end)


def test_the_result_comes_back_from_another_process() -> None:
    result = run_isolated(double, 21)
    assert not isinstance(result, Failed)
    assert result["twice"] == 42
    assert result["process"] != os.getpid()


def test_what_the_case_prints_is_not_taken_for_its_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_isolated(chatter) == "the result"
    out, err = capfd.readouterr()
    assert out == ""
    assert "progress on standard output" in err
    assert "and below Python" in err


def test_threads_are_pinned_for_torch_and_openmp() -> None:
    assert run_isolated(torch_threads, threads=1) == {"torch": 1, "openmp": "1"}


def test_the_environment_is_added_to() -> None:
    assert run_isolated(environment, "PLANTED", env={"PLANTED": "here"}) == "here"


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (kill_itself, [int(signal.SIGKILL)], "killed by SIGKILL: the system does so where memory runs out"),
        (kill_itself, [int(signal.SIGSEGV)], "killed by SIGSEGV"),
        (mistake, ["model.heads=5 does not divide"], "model.heads=5 does not divide"),
        (crash, [], "RuntimeError: the first line"),
        (leave, [7], "ended with code 7 and said nothing"),
        (not_picklable, [], "TypeError: cannot pickle 'generator' object"),
        (double, [Unreadable()], "ModuleNotFoundError: No module named 'isoforward.nowhere'"),
    ],
)
def test_a_call_that_dies_is_a_result_with_its_reason(
    function: Callable[..., Any], arguments: list[Any], reason: str
) -> None:
    assert run_isolated(function, *arguments) == Failed(reason)


def test_a_dataclass_comes_back_as_it_went() -> None:
    point = Point(at=3, beside=[Path("a"), None])
    assert run_isolated(dataclasses.replace, point) == point


def test_functions_and_classes_of_a_script_travel(tmp_path: Path) -> None:
    """Of a module that no process but the script's own could import."""
    (tmp_path / "question.py").write_text(SCRIPT)
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)}
    command = [sys.executable, str(tmp_path / "question.py")]
    said = subprocess.run(command, env=paths, cwd="/", capture_output=True, text=True).stdout
    assert said == "Twice(number=42) True\n"


def test_a_child_that_is_left_is_ended() -> None:
    with Child(sleep, 60) as child:
        assert child.running
    assert not child.running


def test_a_case_that_takes_too_long_is_ended_and_reported() -> None:
    assert run_isolated(sleep, 60, timeout_s=0.5) == Failed("took longer than 0.5 s")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept by Linux")
@pytest.mark.parametrize("target", [allocate, allocate_tensor])
def test_memory_is_bounded_beyond_the_imports(target: Callable[[int], int]) -> None:
    assert run_isolated(allocate, 2**20, memory_bytes=2**29) == 2**20
    failed = run_isolated(target, 2**36, memory_bytes=2**34)  # more than any build of torch maps when it is imported
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("out of memory (")


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for a child of its own, which has started."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored where a shell has put us &
        "from isoforward.base.subprocesses import run_isolated; from tests.base import test_subprocesses as here;"
        f"run_isolated(here.write_down_its_end, '{tmp_path}/end')"
    )
    paths = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL) as parent:
        started = tmp_path / "end.started"
        while not (started.exists() and started.read_text()):
            assert parent.poll() is None
            time.sleep(0.02)
        yield parent


def test_an_interrupt_is_passed_on_before_the_parent_ends(parent: subprocess.Popen[bytes], tmp_path: Path) -> None:
    parent.send_signal(signal.SIGINT)
    parent.wait()
    assert (tmp_path / "end").read_text() == "interrupted"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a child of its parent's death on Linux")
def test_no_case_outlives_a_killed_parent(parent: subprocess.Popen[bytes], tmp_path: Path) -> None:
    state = Path("/proc", (tmp_path / "end.started").read_text(), "stat")
    parent.kill()
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.02)
    assert not (tmp_path / "end").exists()


def test_a_waiting_parent_sleeps() -> None:
    before = time.process_time()
    run_isolated(sleep, 2)
    assert time.process_time() - before < 0.5
