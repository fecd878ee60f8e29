"""Bytes that this process holds, as the system sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch


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
    """Of this process, as Linux sees it."""

    def now(self) -> int:
        return self.field("VmRSS")

    def peak(self) -> int:
        return self.field("VmHWM")

    def field(self, name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{name}:")[1].split()[0])

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")


class CudaMemory:
    """Of torch's allocator, which all tensors and cuBLAS' workspace come from."""

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()
