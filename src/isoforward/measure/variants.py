"""Training steps under several settings: timed in pairs against the first in one process; memory of each apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from isoforward.base.results import Row, RowFields, write
from isoforward.measure.benchmark import Measured
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.memory import account_rows
from isoforward.measure.memory_ledger import optimizer_state
from isoforward.measure.passes import Bench, measure_apart
from isoforward.measure.train_and_serve import Training, training_flop_rows
from isoforward.model.optim import build
from isoforward.model.steps import train_step


def time_variants(cases: Sequence[Case], results: Path, command: str) -> str:
    """Appends the time and the FLOPs of each phase under each case, which its labels tell apart; the environment's id.

    What is measured and how precisely is the first case's.
    """
    return measure_apart(cases[0], bench, cases, results=results, command=command)


def bench(first: Case, cases: Sequence[Case]) -> Bench:
    """Every phase of every case against the same phase of the first."""
    lives = [Training(case, master_of(case), *batch_of(case)) for case in cases]
    base, *others = lives
    pairs = [pair for each in others for pair in zip(each.phased.parts, base.phased.parts, strict=True)]
    pairs += [(each.part("step"), base.part("step")) for each in others]

    def rows(measured: Measured) -> Iterator[Row]:
        for case in cases:
            yield from training_flop_rows(case, "hardware")  # what the device computes, recomputation too

    works = [work for each in lives for work in (each.phased, each.whole)]
    return Bench(works=works, pairs=pairs, rows=rows)


def state_row(case: Case) -> Row:
    """What the optimizer keeps, read from it after a step."""
    model = master_of(case)
    optimizer = build(model, case.optim)
    train_step(model, optimizer, *batch_of(dataclasses.replace(case, batch=1)))
    held = sum(value.nbytes for value in optimizer_state(optimizer) if isinstance(value, Tensor))
    about: RowFields = {"life": "training", "phase": "optimizer", "quantity": "state", "per": "run"}
    return case.row(about, value=float(held), provenance="counted", conditions=case.conditions())


def weigh_variants(cases: Sequence[Case], results: Path, environment_id: str) -> None:
    """Appends the memory of a training step under each case: every phase's peak, and what the whole's is made of."""
    for case in cases:
        rows = account_rows(case, "training")
        write(results, [dataclasses.replace(each, environment=environment_id) for each in rows])
