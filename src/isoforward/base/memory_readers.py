"""Bytes that this process holds, as the system sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory(Protocol):
    """Bytes; `peak` since `reset`."""

    def now(self) -> int: ...
    def peak(self) -> int: ...
    def reset(self) -> None: ...


class Unmeasured:
    def now(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def reset(self) -> None:
        pass


class ProcessMemory:
    """Of this process, as Linux sees it. OSError where /proc is not there, or is read-only: `why_unreadable` asks."""

    def now(self) -> int:
        return self.field("VmRSS")

    def peak(self) -> int:
        return self.field("VmHWM")

    def field(self, name: str) -> int:
        status = STATUS.read_text()
        return 1024 * int(status.split(f"{name}:")[1].split()[0])

    def reset(self) -> None:
        CLEAR_REFS.write_text("5")


class CudaMemory:
    """Of torch's allocator, which all tensors and cuBLAS' workspace come from."""

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def held_bytes() -> int:
    """By this process; 0 where the system does not say."""
    try:
        return ProcessMemory().now()
    except (OSError, IndexError):
        return 0


def why_unreadable(device: str) -> str | None:
    """Why the peak of a phase on `device` cannot be read here; None where it can."""
    if device != "cpu":
        return None
    memory = ProcessMemory()
    try:
        memory.now()
        memory.reset()
    except (OSError, IndexError) as error:  # IndexError: gVisor, among others, leaves the fields out
        named = getattr(error, "filename", None) or STATUS
        return f"{named} cannot be {'written' if named == str(CLEAR_REFS) else 'read'} here, which tells a peak"
    return None
