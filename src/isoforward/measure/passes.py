"""A question's measuring, in fresh processes of its own: what each gives, and how that becomes rows of results.jsonl.

Time, memory and FLOPs are never taken in one pass. A process that times builds its work itself, from the case alone, so
that nothing that ran before inflates a peak or warms a cache, and measuring changes nobody's weights.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import torch

from isoforward.base.environment import environment
from isoforward.base.errors import BadInput, Stopped
from isoforward.base.results import Comparison, Environment, Row, RowFields, Subject, Verdict, write
from isoforward.base.statistics import Estimate, Ratio, estimate_across, judge, ratio_across, summarise
from isoforward.base.subprocesses import Child, Failed, run_isolated
from isoforward.measure.benchmark import Measured, Pair, Part, Progress, Work, measure, part_by_part
from isoforward.measure.case import Case
from isoforward.measure.roofline import peak_rows, reference_works
from isoforward.measure.trust import Findings, Times, disturbing, findings, imprecise_of, verdict

T = TypeVar("T")

DIGITS = 7  # significant ones of a sample that is kept


def _no_rows(measured: Measured) -> Iterable[Row]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a question times, what of it is compared, and the rows that it has beside."""

    works: Sequence[Work]
    pairs: Sequence[Pair] = ()
    rows: Callable[[Measured], Iterable[Row]] = _no_rows


def against_first(ways: Sequence[Sequence[Work]], rows: Callable[[Measured], Iterable[Row]] = _no_rows) -> Bench:
    """The works of each way, part by part against those of the first, whose last ones another may lack."""
    base, *others = ways
    pairs = [pair for each in others for pair in part_by_part(each, base[: len(each)])]
    return Bench(works=[*chain.from_iterable(ways)], pairs=pairs, rows=rows)


Build = Callable[..., Bench]  # from a case, and whatever else the question hands it


@dataclass(frozen=True, kw_only=True)
class Compared:
    pair: Pair
    ratio: Ratio
    spent_s: float
    retaken: int


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one process measured, as it travels back."""

    where: Environment
    times: Sequence[tuple[int, Part, Estimate, Sequence[float]]]  # of which work, and the samples taken again
    compared: Sequence[Compared]
    rows: Sequence[Row]
    findings: Findings


def measure_apart(case: Case, build: Build, *more: object, results: Path, command: str) -> str:
    """Appends to `results` what `build(case, *more)` is measured to; gives the id of the environment it holds in.

    In `measure.processes` fresh processes, one after the other. A failure there is a BadInput with its reason. Ctrl-C
    is a Stopped, after what was measured is written with a verdict that says so.
    """
    told: list[Told] = []
    while len(told) < case.measure.processes and not (told and told[-1].findings.stopped):
        told.append(time_apart(case, build, more, command))
    if (stopped := told[-1].findings).stopped and len(told) > 1:  # it may lack what others have, and two are too few
        told = told[:-1] if len(told) > 3 else told[:1]
        told[0] = dataclasses.replace(told[0], findings=dataclasses.replace(told[0].findings, stopped=stopped.stopped))
    where, records = merged(case, told)
    write(results, [where, *records])
    if stopped.stopped:
        raise Stopped(signal.SIGINT, f"stopped early; {results} has what was measured until then")
    return where.id


def time_apart(case: Case, build: Build, more: Sequence[object], command: str) -> Told:
    """In a session of its own, so that Ctrl-C reaches it once, from here: it then tells what it has."""
    with Child(time_here, case, build, more, command, threads=case.threads, new_session=True) as child:
        try:
            outcome = child.outcome()
        except KeyboardInterrupt:
            if child.running or isinstance(outcome := child.outcome(), Failed):
                raise
    return measured_or_refused(outcome, case.experiment)


def call_apart(
    function: Callable[..., T],
    *arguments: object,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    what: str = "it",
) -> T:
    """What `function(*arguments)` gives in a fresh process; its failure is a BadInput with the reason."""
    return measured_or_refused(run_isolated(function, *arguments, threads=threads, env=env), what)


def measured_or_refused(outcome: T | Failed, what: str) -> T:
    if isinstance(outcome, Failed):
        raise BadInput(f"{what} could not be measured: {outcome.reason}")
    return outcome


def time_here(case: Case, build: Build, more: Sequence[object], command: str) -> Told:
    """The timing pass, in this process."""
    where = environment(command, torch.device(case.device))
    bench = build(case, *more)
    references = reference_works(case)
    measured = measure(
        bench.works, bench.pairs, case.measure, seed=case.seed, references=references, show=live_line(case.experiment)
    )
    end_live_line()
    timed = [
        (n, part)
        for n, work in enumerate(bench.works)
        for part in work.parts
        if any(part in b.samples for b in measured.blocks)
    ]
    retaken = {part: [s for b in measured.blocks for s in b.retaken.get(part, ())] for _, part in timed}
    compared = [
        Compared(pair=pair, ratio=measured.judgement(pair).ratio, spent_s=block.spent_s, retaken=block.again)
        for block in measured.blocks
        for pair in block.pairs
    ]
    return Told(
        where=where,
        times=[(n, part, measured.estimate(part), retaken[part]) for n, part in timed],
        compared=compared,
        rows=[*bench.rows(measured), *peak_rows(case, measured.references)],
        findings=findings(measured),
    )


def merged(case: Case, told: Sequence[Told]) -> tuple[Environment, list[Row | Comparison | Verdict]]:
    """What one process measured, or several together."""
    where = told[0].where
    several = len(told) > 1
    known: list[tuple[int, Part, Estimate]] = []
    records: list[Row | Comparison | Verdict] = []
    for each in zip(*(one.times for one in told), strict=True):
        work, part, estimate, _ = each[0]
        if several:
            estimate = estimate_across([one for *_, one, _ in each])
        known.append((work, part, estimate))
        retaken = rounded([sample for *_, samples in each for sample in samples])
        records.append(
            case.row(part.about, fields(estimate), quantity=part.quantity, retaken=retaken, environment=where.id)
        )
    beside = zip(*(one.rows for one in told), strict=True)
    records += [dataclasses.replace(across(rows), environment=where.id) for rows in beside]
    for compared in zip(*(one.compared for one in told), strict=True):
        ratio = ratio_across([one.ratio for one in compared]) if several else compared[0].ratio
        spent_s, retaken = sum(one.spent_s for one in compared), sum(one.retaken for one in compared)
        about = (case.experiment, compared[0].pair, ratio, case.measure.margin, spent_s, retaken)
        records.append(comparison_of(*about, environment=where.id))
    found = [one.findings for one in told]
    if several:
        imprecise = imprecise_of(works_of(known), case.measure.precision)
        found = [dataclasses.replace(one, imprecise=imprecise) for one in found]
    records.append(verdict(case.experiment, found, case.measure, environment=where.id))
    return where, records


def works_of(known: Iterable[tuple[int, Part, Estimate]]) -> Times:
    """The times of each work together."""
    together = (list(each) for _, each in groupby(known, key=itemgetter(0)))
    return [([part for _, part, _ in each], [estimate for *_, estimate in each]) for each in together]


def across(rows: Sequence[Row]) -> Row:
    """One row that each process has: what is counted is the same in all of them, what follows from samples is not."""
    first = rows[0]
    if len(rows) == 1 or not first.samples:
        return first
    return dataclasses.replace(first, **fields(estimate_across([summarise(row.samples) for row in rows])))


def comparison(experiment: str, pair: Pair, measured: Measured, environment: str) -> Comparison:
    """Of one process."""
    block = measured.block(pair)
    ratio = measured.judgement(pair).ratio
    return comparison_of(experiment, pair, ratio, measured.margin, block.spent_s, block.again, environment=environment)


def comparison_of(
    experiment: str, pair: Pair, ratio: Ratio, margin: float, spent_s: float, retaken: int, *, environment: str
) -> Comparison:
    found = judge(ratio, margin=margin, spent_s=spent_s)
    return Comparison(
        experiment=experiment,
        first=subject(pair[0]),
        second=subject(pair[1]),
        value=ratio.value,
        low=ratio.interval.low,
        high=ratio.interval.high,
        interval=ratio.interval.kind,
        confidence=ratio.interval.confidence,
        pairs=ratio.n,
        looks=ratio.interval.looks,
        margin=margin,
        outcome=found.outcome,
        needed_s=found.needed_s,
        retaken=retaken,
        environment=environment,
    )


def subject(part: Part) -> Subject:
    return Subject(life=part.life, phase=part.phase, conditions=dict(part.conditions))


def rounded(samples: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{sample:.{DIGITS}g}") for sample in samples)


def fields(estimate: Estimate) -> RowFields:
    """Of a row: the median with its interval."""
    return {
        "value": estimate.median,
        "low": estimate.interval.low,
        "high": estimate.interval.high,
        "interval": estimate.interval.kind,
        "confidence": estimate.interval.confidence,
        "samples": rounded(estimate.samples),
    }


def derived(case: Case, part: Part, samples: Sequence[float], *, quantity: str | None = None) -> Row:
    """A row of what follows from samples, such as their differences or slopes."""
    return case.row(part.about, derived_fields(samples), quantity=quantity or part.quantity)


def derived_fields(samples: Sequence[float]) -> RowFields:
    return fields(summarise(samples))


def live_line(what: str) -> Callable[[Progress], None] | None:
    """On a terminal, one line that is written over; elsewhere None."""
    if not sys.stderr.isatty():
        return None

    def show(progress: Progress) -> None:
        known = f"{progress.known} of {progress.asked} known"
        worst = "" if progress.worst is None else f", the others to {progress.worst:.1%}"
        left = f", at most {progress.left_s:.0f} s more" if progress.left_s else ""
        over = progress.disturbance
        lost = f", {disturbing(over, progress.busiest)} took {over.lost_share:.0%}" if over.disturbed else ""
        line = f"measuring {what}: {known}{worst}{lost}{left}"
        room = shutil.get_terminal_size().columns - 1  # a line that wraps would not be written over
        print(f"\r\x1b[K{line[:room]}", end="", file=sys.stderr)
        sys.stderr.flush()

    return show


def end_live_line() -> None:
    """However measuring ended, nothing of the line stays."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
