from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isoforward.base.errors import BadInput
from isoforward.base.subprocesses import Failed, run_isolated

HERE = "tests.base.test_subprocesses"


def double(number: int) -> dict[str, int]:
    return {"twice": 2 * number, "process": os.getpid()}


def chatter(_: Any) -> str:
    print("progress on standard output")
    os.write(1, b"and below Python\n")
    return "the result"


def torch_threads(_: Any) -> dict[str, Any]:
    import torch

    return {"torch": torch.get_num_threads(), "openmp": os.environ["OMP_NUM_THREADS"]}


def environment(name: str) -> str:
    return os.environ[name]


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def mistake(message: str) -> None:
    raise BadInput(message)


def crash(_: Any) -> None:
    raise RuntimeError("the first line\nand the second")


def leave(code: int) -> None:
    os._exit(code)


def not_json(_: Any) -> set[int]:
    return {1}


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
    result = run_isolated(f"{HERE}:double", 21)
    assert result["twice"] == 42
    assert result["process"] != os.getpid()


def test_what_the_case_prints_is_not_taken_for_its_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_isolated(f"{HERE}:chatter", None) == "the result"
    out, err = capfd.readouterr()
    assert out == ""
    assert "progress on standard output" in err
    assert "and below Python" in err


def test_threads_are_pinned_for_torch_and_openmp() -> None:
    assert run_isolated(f"{HERE}:torch_threads", None, threads=1) == {"torch": 1, "openmp": "1"}


def test_the_environment_is_added_to() -> None:
    assert run_isolated(f"{HERE}:environment", "PLANTED", env={"PLANTED": "here"}) == "here"


@pytest.mark.parametrize(
    ("target", "payload", "reason"),
    [
        ("kill_itself", int(signal.SIGKILL), "killed by SIGKILL: the system does so where memory runs out"),
        ("kill_itself", int(signal.SIGSEGV), "killed by SIGSEGV"),
        ("mistake", "model.heads=5 does not divide", "BadInput: model.heads=5 does not divide"),
        ("crash", None, "RuntimeError: the first line"),
        ("leave", 7, "ended with code 7 and said nothing"),
        ("not_json", None, "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_a_case_that_dies_is_a_result_with_its_reason(target: str, payload: Any, reason: str) -> None:
    assert run_isolated(f"{HERE}:{target}", payload) == Failed(reason)


def test_a_target_that_does_not_exist_is_a_failed_case() -> None:
    failed = run_isolated("isoforward.nowhere:case", None)
    assert failed == Failed("ModuleNotFoundError: No module named 'isoforward.nowhere'")


def test_a_case_that_takes_too_long_is_ended_and_reported() -> None:
    assert run_isolated(f"{HERE}:sleep", 60, timeout_s=0.5) == Failed("took longer than 0.5 s")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept by Linux")
@pytest.mark.parametrize("target", ["allocate", "allocate_tensor"])
def test_memory_is_bounded_beyond_the_imports(target: str) -> None:
    assert run_isolated(f"{HERE}:allocate", 2**20, memory_bytes=2**29) == 2**20
    failed = run_isolated(f"{HERE}:{target}", 2**32, memory_bytes=2**31)
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("out of memory (")


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for a child of its own, which has started."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored where a shell has put us &
        "from isoforward.base.subprocesses import run_isolated;"
        f"run_isolated('{HERE}:write_down_its_end', '{tmp_path}/end')"
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
    run_isolated(f"{HERE}:sleep", 2)
    assert time.process_time() - before < 0.5
