"""Every pass over both lives of one model, each in processes of its own, into one results file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from isoforward.base.results import Row, write
from isoforward.measure import transformers_lives
from isoforward.measure.benchmark import Part
from isoforward.measure.case import Case, batch_of, frozen_of, master_of
from isoforward.measure.memory import LIVES, account_rows
from isoforward.measure.passes import call_apart, measure_apart
from isoforward.measure.train_and_serve import Serving, Training, bench


def measure_both_lives(case: Case, results: Path, command: str) -> None:
    """Appends the rows of every pass to `results`."""
    wrapped = case.model.source == "transformers"
    where = measure_apart(case, transformers_lives.bench if wrapped else bench, results=results, command=command)
    rows: list[Row] = []
    for life in LIVES:
        rows += transformers_lives.memory_rows(case, life) if wrapped else account_rows(case, life)
    if not wrapped:
        rows += cold_rows(case)
    write(results, [dataclasses.replace(row, environment=where) for row in rows])


def cold_rows(case: Case) -> Iterator[Row]:
    """The very first execution of each phase, which pays for libraries, memory and the optimizer's state.

    A second first execution in one process is not cold, so that each life has a process of its own. A single sample
    each: no interval.
    """
    for life in ("training", "inference"):
        for part, time_s in call_apart(first_times, case, life, threads=case.threads, what="the first execution"):
            yield case.row(part.labelled(cold=True).about, quantity="time", value=time_s)


def first_times(case: Case, life: str) -> list[tuple[Part, float]]:
    master, (tokens, targets) = master_of(case), batch_of(case)
    if life == "training":
        work = Training(case, master, tokens, targets).phased
    else:
        work = Serving(case, frozen_of(case, master), tokens).generation
    return list(zip(work.parts, work.run(1), strict=True))
