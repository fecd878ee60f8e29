"""Whether the machine left a measurement alone."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from isoforward.base.estimates import summarise
from isoforward.base.hardware import cgroup, processors
from isoforward.base.results import Condition, Row, Verdict

# What makes numbers hard to believe: the first three are pyperf's.
WIDE_SPREAD = 0.10
WIDE_RANGE = 0.50
SHORT_S = 1e-3
OTHERS_SHARE = 0.10  # of our processors, kept busy by others; half a processor is too much on any machine
OTHERS_CORES = 0.5
STOLEN_SHARE = 0.02  # of the processor time that was wanted, taken by the hypervisor
PREEMPTED_PER_S = 100.0  # a machine to ourselves shows 20
DRIFT = 0.05  # of the reference kernel, from before to after


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The machine at one moment. Counters run from its start; None where the system does not tell."""

    time_s: float
    own_cpu_s: float  # of children too, once they have ended
    all_cpu_s: float | None  # of the processors we may use, by anyone
    stolen_cpu_s: float | None
    runnable: int | None  # threads of others, running or waiting for a processor
    throttled: int | None  # periods in which our control group ran out of its quota
    preempted: int  # times that a thread of ours had to make room
    load: float  # of the last minute, ours included


def look() -> Reading:
    usage, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    busy = stolen = runnable = None
    stat = Path("/proc/stat")
    if stat.exists():
        lines = {line.split()[0]: line.split()[1:] for line in stat.read_text().splitlines()}
        ticks = [[int(n) for n in lines[f"cpu{cpu}"]] for cpu in processors() if f"cpu{cpu}" in lines]
        per_s = os.sysconf("SC_CLK_TCK")
        busy = sum(sum(t[:3]) + sum(t[5:7]) for t in ticks) / per_s  # user, nice, system; irq, softirq
        stolen = sum(t[7] for t in ticks) / per_s
        runnable = int(lines["procs_running"][0]) - _own_running()
    throttled = dict(line.split() for line in (cgroup("cpu.stat", "cpu") or "").splitlines()).get("nr_throttled")
    return Reading(
        time_s=time.perf_counter(),
        own_cpu_s=usage.ru_utime + usage.ru_stime + ended.ru_utime + ended.ru_stime,
        all_cpu_s=busy,
        stolen_cpu_s=stolen,
        runnable=runnable,
        throttled=None if throttled is None else int(throttled),
        preempted=usage.ru_nivcsw,
        load=os.getloadavg()[0],
    )


class Watch:
    """Wrap a measurement in it, then ask `judge_trust`.

    `reference` runs the same work whenever it is called and gives its seconds: hardware.reference_kernel.
    """

    def __init__(self, reference: Callable[[], float], look: Callable[[], Reading] = look) -> None:
        self.reference, self.look = reference, look

    def __enter__(self) -> Watch:
        self.reference_before_s = self.reference()
        self.before = self.look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.after = self.look()
        self.reference_after_s = self.reference()

    def findings(self) -> tuple[dict[str, Condition], list[str]]:
        """Figures, and the reasons for mistrust among them."""
        before, after = self.before, self.after
        cores = len(processors())
        elapsed_s = after.time_s - before.time_s
        own_s = after.own_cpu_s - before.own_cpu_s
        drift = self.reference_after_s / self.reference_before_s - 1
        preempted_per_s = (after.preempted - before.preempted) / max(elapsed_s, own_s)
        figures: dict[str, Condition] = {
            "elapsed_s": elapsed_s,
            "load": before.load,
            "drift": drift,
            "preempted_per_s": preempted_per_s,
        }
        reasons = []
        if before.all_cpu_s is not None and after.all_cpu_s is not None:
            others_s = max(0.0, after.all_cpu_s - before.all_cpu_s - own_s)
            figures["others_cores"] = others = others_s / elapsed_s
            # Ticks are 10 ms: less than 50 ms cannot be told from their rounding.
            if others >= min(OTHERS_CORES, OTHERS_SHARE * cores) and others_s > 0.05:
                reasons.append(f"contention: other processes kept {others:.1f} of {cores} processors busy")
        elif before.load > cores:
            reasons.append(f"contention: a load average of {before.load:.1f} on {cores} processors")
        if before.stolen_cpu_s is not None and after.stolen_cpu_s is not None:
            stolen_s = after.stolen_cpu_s - before.stolen_cpu_s
            figures["stolen_share"] = stolen = stolen_s / max(stolen_s + own_s, elapsed_s)
            if stolen >= STOLEN_SHARE:
                reasons.append(f"contention: the hypervisor took {stolen:.0%} of the processor time")
        if before.runnable is not None and after.runnable is not None:
            figures["runnable_others"] = runnable = min(before.runnable, after.runnable)
            if runnable >= max(1, OTHERS_SHARE * (os.cpu_count() or 1)):
                reasons.append(f"contention: {runnable} threads of others were runnable, before and after")
        if before.throttled is not None and after.throttled is not None:
            figures["throttled"] = throttled = after.throttled - before.throttled
            if throttled:
                reasons.append(f"throttling: the processor quota ran out in {throttled} periods")
        if preempted_per_s >= PREEMPTED_PER_S:
            reasons.append(f"contention: preempted {preempted_per_s:.0f} times a second")
        if abs(drift) >= DRIFT:
            reasons.append(f"drift: the reference kernel took {drift:+.0%} after the measurement")
        return figures, reasons


def judge_trust(
    experiment: str, rows: Iterable[Row], watch: Watch, *, also: Iterable[str] = (), environment: str = ""
) -> Verdict:
    """Of the times among `rows`, residuals apart; `also` takes reasons from elsewhere, such as a failed identity.

    A row whose samples average several executions says how many in its condition `executions`.
    """
    figures, reasons = watch.findings()
    times = [row for row in rows if row.quantity == "time" and row.samples and row.phase != "residual"]
    estimates = [(summarise(row.samples), row, f"{row.life} {row.phase}") for row in times]
    wide = {
        "spread": (WIDE_SPREAD, [(estimate.spread or 0.0, name) for estimate, _, name in estimates]),
        "range": (WIDE_RANGE, [(estimate.range_relative or 0.0, name) for estimate, _, name in estimates]),
    }
    for kind, (limit, found) in wide.items():
        figures[kind], name = max(found, default=(None, ""))
        if beyond := sum(share >= limit for share, _ in found):
            reasons.append(
                f"{kind}: {beyond} of {len(found)} times vary by {limit:.0%} of their median or more, "
                f"most {name} ({figures[kind]:.0%})"
            )
    lasting = [(one.median * int(row.conditions.get("executions") or 1), name) for one, row, name in estimates]
    shortest_s, name = min(lasting, default=(None, ""))
    figures["shortest_s"] = shortest_s
    if shortest_s is not None and shortest_s < SHORT_S:
        beyond = sum(time_s < SHORT_S for time_s, _ in lasting)
        reasons.append(
            f"short: {beyond} of {len(lasting)} times come from samples below {SHORT_S * 1e3:g} ms, "
            f"least {name} ({shortest_s * 1e3:.2g} ms)"
        )
    reasons += also
    return Verdict(
        experiment=experiment, trusted=not reasons, reasons=tuple(reasons), figures=figures, environment=environment
    )


def _own_running() -> int:
    """Threads of this process that run or want to, this one among them."""
    running = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            running += stat.read_text().rpartition(")")[2].split()[0] == "R"
        except OSError:  # the thread has ended meanwhile
            continue
    return running
