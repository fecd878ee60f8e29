"""What else the machine did while something was timed, read from the system: never inferred from the times.

    run delay    our threads were ready to run and waited for a processor (/proc/self/task/*/schedstat)
    steal        the hypervisor ran another guest on our processor (/proc/stat)
    others       processor time that other processes used (/proc/stat, less our own)
    throttled    our control group ran out of its processor quota (cpu.stat)

Where the system does not say, as outside Linux, a figure is absent and disturbs nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from isoforward.base.hardware import cgroup, processors

LOST_SHARE = 0.03  # of a sample's wall time, waited for a processor or stolen: beyond it the sample is taken again
TICK_S = 0.01  # of /proc/stat: less than two of them are rounding
BUSY_OTHERS = 0.10  # of our processors, used by other processes


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Counters at one moment, in seconds since some start; None where the system does not tell."""

    time_s: float
    run_delay_s: float | None
    stolen_s: float | None
    busy_s: float | None  # of our processors, by anyone
    own_s: float  # processor time of this process and its ended children
    throttled: int | None  # periods


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Between two readings."""

    elapsed_s: float
    run_delay_s: float = 0.0
    stolen_s: float = 0.0
    others_s: float = 0.0
    throttled: int = 0

    @property
    def lost_share(self) -> float:
        """Of the wall time. Steal is read in ticks, so that a single one says nothing."""
        stolen_s = self.stolen_s if self.stolen_s >= 2 * TICK_S else 0.0
        return (self.run_delay_s + stolen_s) / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def disturbed(self) -> bool:
        return self.lost_share > LOST_SHARE or self.throttled > 0

    def __add__(self, other: Disturbance) -> Disturbance:
        return Disturbance(**{name: value + asdict(other)[name] for name, value in asdict(self).items()})


def look() -> Reading:
    times = os.times()
    stolen = busy = None
    with suppress(OSError, ValueError, IndexError):
        wanted = {f"cpu{n}" for n in processors()}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        ticks = [[int(n) for n in line[1:]] for line in lines if line[0] in wanted]
        per_s = os.sysconf("SC_CLK_TCK")
        busy = sum(sum(t[:3]) + sum(t[5:7]) for t in ticks) / per_s  # user, nice, system; irq, softirq
        stolen = sum(t[7] for t in ticks) / per_s
    return Reading(
        time_s=time.perf_counter(),
        run_delay_s=run_delay_s(),
        stolen_s=stolen,
        busy_s=busy,
        own_s=times.user + times.system + times.children_user + times.children_system,
        throttled=_throttled(),
    )


def between(before: Reading, after: Reading) -> Disturbance:
    def grown(name: str) -> float:
        first, last = getattr(before, name), getattr(after, name)
        return 0.0 if first is None or last is None else max(0.0, last - first)

    own_s = after.own_s - before.own_s
    return Disturbance(
        elapsed_s=after.time_s - before.time_s,
        run_delay_s=grown("run_delay_s"),
        stolen_s=grown("stolen_s"),
        others_s=max(0.0, grown("busy_s") - own_s) if after.busy_s is not None else 0.0,
        throttled=int(grown("throttled")),
    )


def process_times_s() -> Mapping[tuple[int, str], float]:
    """Processor time of every process of others so far, by its id and name; empty where /proc does not tell."""
    found = {}
    own, per_s = os.getpid(), os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            before, _, after = stat.read_text().rpartition(")")
            pid, _, name = before.partition(" (")
            fields = after.split()
            if int(pid) != own:
                found[int(pid), name] = (int(fields[11]) + int(fields[12])) / per_s
    return found


def busiest(before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float]) -> tuple[str, float]:
    """The other process that used most processor time in between: its name and that time; ("", 0) if none did."""
    used = {key: time_s - before.get(key, 0.0) for key, time_s in after.items()}
    (_, name), time_s = max(used.items(), key=lambda item: item[1], default=((0, ""), 0.0))
    return name, time_s


def run_delay_s(process: int | str = "self") -> float | None:
    """Waited on a run queue: the second number of schedstat, in ns, summed over the threads that there are."""
    total, found = 0, False
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread that has ended meanwhile
            total += int(path.read_text().split()[1])
            found = True
    return total * 1e-9 if found else None


def _throttled() -> int | None:
    lines = (cgroup("cpu.stat", "cpu") or "").splitlines()
    count = dict(line.split() for line in lines if len(line.split()) == 2).get("nr_throttled")
    return None if count is None else int(count)
