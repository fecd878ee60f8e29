"""Whether the numbers of a run can be believed: the precision that was asked for was reached, and nothing disturbed.

A wide spread of single samples is no reason by itself: an interval that is narrow all the same says what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isoforward.base.config import MeasureConfig
from isoforward.base.disturbance import BUSY_OTHERS, Disturbance
from isoforward.base.hardware import processors
from isoforward.base.results import MOST_REASONS, Verdict
from isoforward.base.statistics import Estimate, trend
from isoforward.base.vocabulary import Condition
from isoforward.measure.benchmark import Measured, Part, half_widths

DISTURBED_SHARE = 0.10  # of the samples kept although disturbed
DRIFT = 0.10  # of a reference kernel, from the first to the last round
ENOUGH_FOR_A_TREND = 50
OR_LESS = "or a larger measure.precision"


@dataclass(frozen=True, kw_only=True)
class Imprecise:
    name: str
    half_width: float  # relative to the whole that it is a part of


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Of one process' measuring."""

    times: int
    imprecise: tuple[Imprecise, ...]
    samples: int
    retaken: int
    disturbed: int  # kept all the same
    disturbance: Disturbance
    busiest: tuple[str, float]
    drift: float | None  # certain change of a reference kernel; None where none is certain
    stopped: bool


Times = Sequence[tuple[Sequence[Part], Sequence[Estimate]]]  # of each work, part by part


def imprecise_of(works: Times, precision: float) -> tuple[Imprecise, ...]:
    """The times that are known less precisely than that, relative to the whole that each is a part of."""
    return tuple(
        Imprecise(name=f"{part.life} {part.phase}", half_width=half)
        for parts, estimates in works
        for part, estimate, half in zip(parts, estimates, half_widths(estimates), strict=True)
        if half > precision or not estimate.interval.reached
    )


def findings(measured: Measured) -> Findings:
    works = {work.parts: work for block in measured.blocks for work in block.works}  # one may be in several blocks
    times = [(parts, [measured.estimate(part) for part in parts]) for parts in works]
    trends = [trend(samples) for samples in measured.references.values() if len(samples) >= ENOUGH_FOR_A_TREND]
    certain = [found.change for found in trends if found.drifts]
    return Findings(
        times=sum(len(parts) for parts in works),
        imprecise=imprecise_of(times, measured.precision),
        samples=sum(block.n for block in measured.blocks),
        retaken=sum(block.again for block in measured.blocks),
        disturbed=sum(block.disturbed for block in measured.blocks),
        disturbance=measured.disturbance,
        busiest=measured.busiest,
        drift=max(certain, key=abs, default=None),
        stopped=measured.stopped,
    )


def verdict(experiment: str, found: Sequence[Findings], plan: MeasureConfig, *, environment: str = "") -> Verdict:
    """At most two reasons, the weightiest first, each with what a user can do about it."""
    over = over_all(found)
    samples, retaken = sum(one.samples for one in found), sum(one.retaken for one in found)
    disturbed = sum(one.disturbed for one in found)
    drift = max((one.drift for one in found if one.drift is not None), key=abs, default=None)
    counts: dict[str, Condition] = {"samples": samples, "retaken": retaken, "disturbed": disturbed}
    figures = counts | shares(over) | {"throttled": over.throttled, "drift": drift}
    reasons = []
    if any(one.stopped for one in found):
        reasons.append("stopped early by Ctrl-C: what was measured until then is kept")
    if (disturbance := disturbed_by(found)) is not None:
        reasons.append(disturbance)
    imprecise = max((one.imprecise for one in found), key=len)
    if imprecise:
        reasons.append(precision_missed(imprecise, found[0].times, plan))
    if drift is not None and abs(drift) > DRIFT:
        reasons.append(f"the machine's speed changed by {drift:+.0%} meanwhile: ratios hold, single times may not")
    return Verdict(
        experiment=experiment,
        trusted=not reasons,
        reasons=tuple(reasons[:MOST_REASONS]),
        figures=figures,
        environment=environment,
    )


def over_all(found: Sequence[Findings]) -> Disturbance:
    first, *others = (one.disturbance for one in found)
    return sum(others, first)


def disturbed_by(found: Sequence[Findings]) -> str | None:
    """By whom, and the way out; None where the machine was left alone, or what disturbed could be taken again."""
    over, samples = over_all(found), sum(one.samples for one in found)
    if sum(one.disturbed for one in found) <= DISTURBED_SHARE * samples and not crowded(over):
        return None
    return disturber(over, max((one.busiest for one in found), key=lambda busiest: busiest[1]))


def alone(experiment: str, over: Disturbance, *, environment: str = "", others_are_measured: bool = False) -> Verdict:
    """Of work that cannot be repeated, such as a whole training: whether the machine left it alone.

    `others_are_measured`: a server here is what the numbers are of, and disturbs them not.
    """
    others = crowded(over) and not others_are_measured
    reasons = (disturber(over, ("", 0.0)),) if over.disturbed or others else ()
    return Verdict(
        experiment=experiment, trusted=not reasons, reasons=reasons, figures=shares(over), environment=environment
    )


def shares(over: Disturbance) -> dict[str, Condition]:
    elapsed_s = max(over.elapsed_s, 1e-9)
    return {
        "elapsed_s": over.elapsed_s,
        "run_delay_share": over.run_delay_s / elapsed_s,
        "stolen_share": over.stolen_s / elapsed_s,
        "others_cores": others_cores(over),
    }


def others_cores(over: Disturbance) -> float:
    return over.others_s / max(over.elapsed_s, 1e-9)


def crowded(over: Disturbance) -> bool:
    return others_cores(over) > BUSY_OTHERS * len(processors())


def disturber(over: Disturbance, busiest: tuple[str, float]) -> str:
    """By whom, and the way out."""
    if over.throttled:
        return f"the processor quota of this control group ran out in {over.throttled} periods: grant it more"
    who = disturbing(over, busiest)
    if crowded(over) and not stolen(over):
        return (
            f"{who} used {others_cores(over):.1f} of {len(processors())} processors: "
            "run again when they are done, or with a larger measure.budget"
        )
    return f"{who} took {over.lost_share:.1%} of the time: run again at a quieter time, or with a larger measure.budget"


def disturbing(over: Disturbance, busiest: tuple[str, float]) -> str:
    if over.throttled:
        return "the processor quota"
    if stolen(over):
        return "the hypervisor"
    name, time_s = busiest
    return "other processes" + (f" (mostly {name})" if name and time_s > 0.3 * over.others_s else "")


def stolen(over: Disturbance) -> bool:
    """Whether that is what it was disturbed by."""
    return over.disturbed and over.stolen_s > over.run_delay_s


def precision_missed(imprecise: Sequence[Imprecise], times: int, plan: MeasureConfig) -> str:
    worst = max(imprecise, key=lambda one: one.half_width)
    told = f"{len(imprecise)} of {times} times are known less precisely than {plan.precision:.0%}, "
    told += f"{worst.name} to {worst.half_width:.1%}"
    if plan.processes > 1:  # whose differences are most of it
        wider = (worst.half_width / plan.precision) ** 2
        return f"{told}: write measure.processes={min(64, max(5, round(plan.processes * wider)))}, {OR_LESS}"
    if plan.repeats is not None:
        more = min(100.0, max(2.0, (worst.half_width / plan.precision) ** 2))
        return f"{told}: write measure.repeats={round(plan.repeats * more)}"
    needed_s = plan.budget * min(100.0, max(1.5, (worst.half_width / plan.precision) ** 2))
    return f"{told}: write measure.budget={float(f'{needed_s:.1g}'):.0f}, {OR_LESS}"
