"""One case, one process: nothing that ran before inflates its peak, and its death is a result.

The parent sleeps until the child has written one line of JSON or is gone.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
GRACE_S = 5.0  # for a child to end after SIGINT


@dataclass(frozen=True)
class Failed:
    reason: str


def run_isolated(
    target: str,
    payload: Any,
    *,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    memory_bytes: int | None = None,
) -> Any:
    """What `target` ("module:function") makes of `payload`, both JSON, in a fresh process; or Failed, never a raise.

    The child finds modules where this process does. `threads` pins torch and OpenMP, `env` is added to the
    environment, `memory_bytes` bounds what the case may map beyond its imports.
    """
    command = [sys.executable, "-P", "-m", "isoforward.base.subprocesses"]
    found = {"PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)}
    pinned = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment = {**os.environ, **found, **pinned, **(env or {})}
    case = json.dumps({"target": target, "payload": payload, "threads": threads, "memory_bytes": memory_bytes})
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        answer, _ = child.communicate(case, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Failed(f"took longer than {timeout_s:g} s")
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        raise
    finally:
        child.kill()
        child.communicate()
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        hint = ": the system does so where memory runs out" if name == "SIGKILL" else ""
        return Failed(f"killed by {name}{hint}")
    if not answer:
        return Failed(f"ended with code {child.returncode} and said nothing")
    outcome = json.loads(answer)
    return Failed(outcome["failed"]) if "failed" in outcome else outcome["result"]


def reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    exhausted = isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text
    return f"out of memory ({text})" if exhausted else text


def bound_memory(more: int) -> None:
    import resource  # not on Windows

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the case prints is not its result
    case = json.load(sys.stdin)
    try:
        module, function = case["target"].split(":")
        run = getattr(importlib.import_module(module), function)
        if case["threads"] is not None and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(case["threads"])
        if case["memory_bytes"] is not None:
            bound_memory(case["memory_bytes"])
        outcome = json.dumps({"result": run(case["payload"])})
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        outcome = json.dumps({"failed": reason(error)})
    answer.write(outcome)
    answer.close()


if __name__ == "__main__":
    main()
