"""What the system says of this machine: its processors, its memory, and how much of both this process may have."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def processors() -> list[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cgroup(name: str, controller: str) -> str | None:
    """A control file of our control group, or of the nearest above it that has one, of version 2 or of version 1."""
    texts = (read_text(level / name) for level in _control_groups(controller))
    return next((text for text in texts if text is not None), None)


def _control_groups(controller: str) -> Iterator[Path]:
    """Our own and all above it: a job's limit often stands there. In a container only some of them can be seen."""
    lines = (read_text("/proc/self/cgroup") or "").splitlines()
    ours = [PurePosixPath(line.rsplit(":", 1)[1].lstrip("/")) for line in lines] or [PurePosixPath()]
    for top in (CONTROL_GROUPS, CONTROL_GROUPS / controller):
        yield from dict.fromkeys(top / level for path in ours for level in (path, *path.parents))


def read_text(path: Path | str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", read_text("/proc/cpuinfo") or "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instructions that the processor has beyond the first ones; none where the system does not say."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", read_text("/proc/cpuinfo") or "", re.M)
    return found[1].split() if found else []


def load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # without /proc, or on Windows
        return None


def cpu_limit() -> float | None:
    """Processors' worth of time that the control groups grant."""
    grants = list[float]()
    for level in _control_groups("cpu"):
        either = read_text(level / "cpu.max") or " ".join(
            read_text(level / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        if granted := re.match(r"(\d+)\s+(\d+)", either):  # "max" and -1 stand for no limit
            grants.append(int(granted[1]) / int(granted[2]))
    return min(grants, default=None)


def follow_quota() -> str | None:
    """No more threads than the control groups grant processors' time, and that in words: others would only wait.

    To be called before torch is loaded, so that all its libraries follow. OMP_NUM_THREADS wins.
    """
    granted, there = cpu_limit(), len(processors())
    if granted is None or granted >= there or "OMP_NUM_THREADS" in os.environ:
        return None
    threads = max(1, int(granted))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes started from here, too
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    return (
        f"{threads} thread{'s'[: threads != 1]}: the control group grants the time of {granted:g} of {there} "
        "processors; OMP_NUM_THREADS=N chooses another number"
    )


def memory_limit_bytes() -> int | None:
    """The least that any of our control groups allows."""
    limits = [
        read_text(level / name)
        for name in ("memory.max", "memory.limit_in_bytes")
        for level in _control_groups("memory")
    ]
    numbers = [int(text) for text in limits if text is not None and text.strip().isdecimal()]  # or "max"
    return min((number for number in numbers if number < 2**60), default=None)  # version 1 writes none as almost 2^63


def memory_bytes() -> int | None:
    """That all of this process can ever have; None where the system does not say."""
    if not hasattr(os, "sysconf"):  # Windows
        return memory_limit_bytes()
    pages = os.sysconf("SC_PHYS_PAGES")
    known = [pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None, memory_limit_bytes()]
    return min((size for size in known if size is not None), default=None)


def memory_available_bytes() -> int | None:
    """That something new can take; None where the system does not say."""
    known = [size for size in (memory_free_bytes(), memory_limit_bytes()) if size is not None]
    return min(known, default=None)


def memory_free_bytes() -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo") or "", re.M)
    return int(found[1]) * 1024 if found else None
