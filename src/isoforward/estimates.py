"""Samples -> estimate -> ratio -> judgement, and whether the machine left the measurement alone.

Every interval is the sign test's: two order statistics, with ranks from the binomial distribution. It needs no law of
the noise and holds its level at any n, where the percentile bootstrap of a median does not: on log-normal noise that
covers 0.91 to 0.94 of the time for 5 to 20 samples, when asked for 0.95.
"""

from __future__ import annotations

import math
import os
import random
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from isoforward.errors import BadInput
from isoforward.hardware import cgroup, processors
from isoforward.results import Condition, Row, Verdict

Sample = TypeVar("Sample")

CONFIDENCE = 0.95
FEWEST = 5

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
class Estimate:
    median: float
    low: float
    high: float
    confidence: float  # that the median lies within [low, high]; 5 samples reach 0.9375 only
    spread: float | None  # interquartile range as a normal's standard deviation, over the median; None at a median of 0
    range_relative: float | None  # (largest - smallest) / median
    outliers: int  # beyond 1.5 interquartile ranges from the quartiles; counted, never dropped
    samples: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.samples)

    def row(self, **about: Any) -> Row:
        """A measured row; `about` is every other field of it."""
        return Row(value=self.median, low=self.low, high=self.high, samples=self.samples, **about)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of the first's samples to the second's: below 1 the first needs less."""

    value: float
    low: float
    high: float
    confidence: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Judgement:
    outcome: str  # faster | slower | no difference: the first, seen from the second
    ratio: Ratio
    reason: str


def summarise(samples: Sequence[float]) -> Estimate:
    values = _checked(samples)
    ordered = np.sort(values)
    k, confidence = _ranks(len(values))
    median = float(np.median(ordered))
    first, third = (float(q) for q in np.quantile(ordered, (0.25, 0.75)))
    fence = 1.5 * (third - first)
    return Estimate(
        median=median,
        low=float(ordered[k]),
        high=float(ordered[-1 - k]),
        confidence=confidence,
        spread=(third - first) / 1.349 / abs(median) if median else None,
        range_relative=float(ordered[-1] - ordered[0]) / abs(median) if median else None,
        outliers=int(np.sum((ordered < first - fence) | (ordered > third + fence))),
        samples=tuple(float(v) for v in values),
    )


def ratio(first: Sequence[float], second: Sequence[float], *, paired: bool = True) -> Ratio:
    """`paired` wants samples that shared a round of `interleaved`, in the order of the rounds.

    Since the order within a round is drawn, a pair of equals lies below or above 1 by a fair coin, however the noise
    drifts, bursts or lasts from sample to sample. Unpaired samples must be independent of each other; their interval
    joins those of both medians, and is wider.
    """
    a, b = _checked(first), _checked(second)
    if min(a.min(), b.min()) <= 0:
        raise BadInput("a ratio needs samples above 0: a part that did not run is absent, not 0")
    if not paired:
        one, two = summarise(first), summarise(second)
        return Ratio(
            value=one.median / two.median,
            low=one.low / two.high,
            high=one.high / two.low,
            confidence=one.confidence * two.confidence,
            n=min(one.n, two.n),
        )
    if len(a) != len(b):
        raise BadInput(f"{len(a)} and {len(b)} samples cannot be paired; measure both in the same rounds")
    logs = np.sort(np.log(a / b))
    k, confidence = _ranks(len(logs))
    value, low, high = np.exp((np.median(logs), logs[k], logs[-1 - k]))
    return Ratio(value=float(value), low=float(low), high=float(high), confidence=confidence, n=len(logs))


def judge(ratio: Ratio, *, tolerance: float = 0.01) -> Judgement:
    """Reports a difference between equals at most 1 - CONFIDENCE of the time; one within `tolerance` never."""
    shown = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}, n={ratio.n})"
    if ratio.low <= 1 <= ratio.high:
        return Judgement(outcome="no difference", ratio=ratio, reason=f"the interval of {shown} holds 1")
    if abs(math.log(ratio.value)) <= math.log1p(tolerance):
        return Judgement(outcome="no difference", ratio=ratio, reason=f"{shown} is within {tolerance:.1%} of 1")
    if ratio.confidence < CONFIDENCE:
        reason = f"{shown} is certain to {ratio.confidence:.1%} only, not {CONFIDENCE:.0%}: take more samples"
        return Judgement(outcome="no difference", ratio=ratio, reason=reason)
    return Judgement(outcome="faster" if ratio.value < 1 else "slower", ratio=ratio, reason=shown)


def interleaved(cases: Mapping[str, Callable[[], Sample]], repeats: int, *, seed: int = 0) -> dict[str, list[Sample]]:
    """Samples of each case, a round at a time, each round in an order of its own.

    Orders are drawn with their reverses, so that of any two cases each goes first in half of the rounds: on a CPU the
    later of two equals wins two rounds in three, its caches and threads being warm.
    """
    draw = random.Random(seed)
    orders: list[list[str]] = []
    while len(orders) < repeats:
        order = draw.sample(list(cases), len(cases))
        orders += [order, order[::-1]]
    del orders[repeats:]
    draw.shuffle(orders)
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for order in orders:
        for name in order:
            samples[name].append(cases[name]())
    return samples


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The machine at one moment. Counters run from its start; None where the system does not tell."""

    time_s: float
    own_cpu_s: float
    all_cpu_s: float | None  # of the processors we may use, by anyone
    stolen_cpu_s: float | None
    runnable: int | None  # threads of others, running or waiting for a processor
    throttled: int | None  # periods in which our control group ran out of its quota
    preempted: int  # times that a thread of ours had to make room
    load: float  # of the last minute, ours included


def look() -> Reading:
    usage = resource.getrusage(resource.RUSAGE_SELF)
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
        own_cpu_s=usage.ru_utime + usage.ru_stime,
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


def _checked(samples: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    if len(samples) < FEWEST:
        raise BadInput(f"{len(samples)} samples are too few to compare or to give an interval; take at least {FEWEST}")
    values = np.asarray(samples, dtype=np.float64)
    if not np.isfinite(values).all():
        raise BadInput(f"sample {int(np.argmin(np.isfinite(values))) + 1} of {len(values)} is not a finite number")
    return values


@cache
def _ranks(n: int) -> tuple[int, float]:
    """The largest k whose order statistics k and n-1-k (from 0) hold the median with CONFIDENCE, and with how much.

    1 - 2 P(Binomial(n, 1/2) <= k), as in Conover, Practical Nonparametric Statistics, section 3.2.
    """

    def chance(k: int) -> float:
        return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))

    k, outside = 0, 2 * chance(0)
    while (wider := outside + 2 * chance(k + 1)) <= 1 - CONFIDENCE:
        k, outside = k + 1, wider
    return k, 1 - outside


def _own_running() -> int:
    """Threads of this process that run or want to, this one among them."""
    running = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            running += stat.read_text().rpartition(")")[2].split()[0] == "R"
        except OSError:  # the thread has ended meanwhile
            continue
    return running
