"""A function called in a fresh process: nothing that ran before inflates its peak, and its death is a result.

The call and its result travel pickled, through files without a name that only the two processes hold. The parent sleeps
until the child is gone.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from isoforward.base.errors import Refusal

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
GRACE_S = 5.0  # for a child to end after SIGINT


@dataclass(frozen=True)
class Failed:
    reason: str


class Child(Generic[T]):
    """`function(*arguments)` in a process of its own, which dies with this one; `with` ends it in any case.

    Function, arguments and result are pickled by cloudpickle: functions and classes of a script, which the child could
    not import, travel by value. The child finds modules where this process does. `threads` pins torch and OpenMP, `env`
    is added to the environment, `memory_bytes` bounds what the call may map beyond its imports. `new_session` keeps a
    terminal's Ctrl-C from it.
    """

    def __init__(
        self,
        function: Callable[..., T],
        *arguments: object,
        threads: int | None = None,
        env: Mapping[str, str] | None = None,
        memory_bytes: int | None = None,
        new_session: bool = False,
    ) -> None:
        import tempfile  # here, since every child would wait for these two

        import cloudpickle

        found = {"PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)}
        pinned = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.answer = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it
        with tempfile.TemporaryFile() as call:
            pickle.dump((threads, memory_bytes), call)
            cloudpickle.dump((function, arguments), call)
            call.seek(0)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from isoforward.base.subprocesses import serve; serve()"],
                stdin=call,
                stdout=self.answer,
                env={**os.environ, **found, **pinned, **(env or {})},
                start_new_session=new_session,
            )

    def __enter__(self) -> Child[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.answer.close()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def outcome(self, timeout_s: float | None = None) -> T | Failed:
        """Waits for the result; Failed with the reason where there is none, never an exception of the child's."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Failed(f"took longer than {timeout_s:g} s")
        except KeyboardInterrupt:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
            raise
        if code < 0:
            name = signal.Signals(-code).name
            hint = ": the system does so where memory runs out" if name == "SIGKILL" else ""
            return Failed(f"killed by {name}{hint}")
        self.answer.seek(0)
        answer = self.answer.read()
        if not answer:
            return Failed(f"ended with code {code} and said nothing")
        result: T | Failed = pickle.loads(answer)
        return result


def run_isolated(
    function: Callable[..., T],
    *arguments: object,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    memory_bytes: int | None = None,
) -> T | Failed:
    """What `function(*arguments)` gives in a fresh process, or Failed, never a raise; see Child for the rest."""
    with Child(function, *arguments, threads=threads, env=env, memory_bytes=memory_bytes) as child:
        return child.outcome(timeout_s)


def reason(error: Exception) -> str:
    name = "" if isinstance(error, Refusal) else f"{type(error).__name__}: "  # a refusal says all by itself
    text = f"{name}{error}".splitlines()[0]
    exhausted = isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text
    return f"out of memory ({text})" if exhausted else text


def bound_memory(more: int) -> None:
    import resource  # not on Windows

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve() -> None:
    """In the child: answers the one call that stdin holds."""
    die_with_parent()
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")  # which children of ours do not inherit
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the call prints is not its result
    call = sys.stdin.buffer
    threads, memory_bytes = pickle.load(call)
    try:
        function, arguments = pickle.load(call)
        if threads is not None and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        if memory_bytes is not None:
            bound_memory(memory_bytes)
        by_value = sys.modules.get("cloudpickle", pickle)  # it was loaded where the call had something by value
        outcome = by_value.dumps(function(*arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        outcome = pickle.dumps(Failed(reason(error)))
    answer.write(outcome)
    answer.close()
