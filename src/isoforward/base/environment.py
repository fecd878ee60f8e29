"""The record of a machine that goes with its numbers: which of them may be compared follows from it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

import isoforward
from isoforward import __version__
from isoforward.base.hardware import (
    cpu_limit,
    cpu_model,
    load_average,
    memory_free_bytes,
    memory_limit_bytes,
    processors,
    read_text,
)
from isoforward.base.results import Environment
from isoforward.base.vocabulary import Condition

if TYPE_CHECKING:
    import torch


def environment(command: str, device: torch.device | None) -> Environment:
    """`device` is where the numbers come from; None where nothing ran, as of a prediction: torch is not loaded to say
    how it would have. Nothing of the user: no host name, and their home as ~.
    """
    with suppress(RuntimeError):  # a user without a home
        home = str(Path.home())
        command = command if home == "/" else command.replace(home, "~")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    ran, gpu_bytes = ({}, None) if device is None else _ran_on(device)
    identity: dict[str, Condition] = ran | {
        "cpu": cpu_model(),
        "processors": len(processors()),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "os": platform.system(),
    }
    commit, changed = _commit()
    details: dict[str, Condition] = {
        "isoforward": __version__,
        "numpy": numpy.__version__,
        "commit": commit,
        "changed": changed,  # files that differ from the commit
        "kernel": platform.release(),
        "affinity": ",".join(map(str, processors())),
        "governor": (read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "").strip() or None,
        "load": load_average(),
        "cpu_limit": cpu_limit(),
        "memory_limit_bytes": memory_limit_bytes(),
        "memory_free_bytes": memory_free_bytes(),
        "gpu_memory_bytes": gpu_bytes,
    }
    digest = hashlib.sha256(json.dumps([identity, created, command]).encode()).hexdigest()
    return Environment(id=digest[:12], command=command, created=created, identity=identity, details=details)


def _ran_on(device: torch.device) -> tuple[dict[str, Condition], int | None]:
    """What of torch must match, and the memory of a GPU."""
    import torch

    from isoforward.base.device import device_of

    asked = device_of(device)
    identity: dict[str, Condition] = {
        "device": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **asked.identity(),
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    return identity, None if asked.kind == "cpu" else asked.total_bytes()


def _commit() -> tuple[str | None, int | None]:
    """Of the checkout that this package runs from, and how many of its files differ; (None, None) outside of one."""
    here = Path(isoforward.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    # Installed beneath another project's checkout, its commit would not be ours.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return (commit or "").strip() or None, None if changes is None else len(changes.splitlines())
