"""The very first execution of each phase, which pays for libraries, memory and the optimizer's state.

A second first execution in one process is not cold, so that each life has a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from isoforward.base.results import Row
from isoforward.measure.benchmark import Part
from isoforward.measure.case import Case, batch_of, frozen_of, master_of
from isoforward.measure.passes import call_apart
from isoforward.measure.train_and_serve import Serving, Training


def cold_rows(case: Case) -> Iterator[Row]:
    """A single sample each: no interval."""
    for life in (first_step, first_generation):
        for part, time_s in call_apart(life, case, threads=case.threads, what="the first execution"):
            yield case.row(part.labelled(cold=True).about, quantity="time", value=time_s)


def first_step(case: Case) -> list[tuple[Part, float]]:
    work = Training(case, master_of(case), *batch_of(case)).phased
    return list(zip(work.parts, work.run(1), strict=True))


def first_generation(case: Case) -> list[tuple[Part, float]]:
    work = Serving(case, frozen_of(case, master_of(case)), batch_of(case)[0]).generation
    return list(zip(work.parts, work.run(1), strict=True))
