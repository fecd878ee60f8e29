"""Training steps under several settings: timed in pairs against the first in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor

from isoforward.base.results import Row, RowFields
from isoforward.measure.benchmark import Measured
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.memory_ledger import optimizer_state
from isoforward.measure.passes import Bench, against_first
from isoforward.measure.train_and_serve import Training, training_flop_rows
from isoforward.model.optim import build
from isoforward.model.steps import train_step


def bench(first: Case, cases: Sequence[Case]) -> Bench:
    """Every phase of every case, which its labels tell apart, against the same phase of the first.

    What is measured and how precisely is the first case's.
    """
    lives = [Training(case, master_of(case), *batch_of(case)) for case in cases]

    def rows(measured: Measured) -> Iterator[Row]:
        for case in cases:
            yield from training_flop_rows(case, "hardware")  # what the device computes, recomputation too

    return against_first([(life.phased, life.whole) for life in lives], rows)


def state_row(case: Case) -> Row:
    """What the optimizer keeps, read from it after a step."""
    model = master_of(case)
    optimizer = build(model, case.optim)
    train_step(model, optimizer, *batch_of(dataclasses.replace(case, batch=1)))
    held = sum(value.nbytes for value in optimizer_state(optimizer) if isinstance(value, Tensor))
    about: RowFields = {"life": "training", "phase": "optimizer", "quantity": "state", "per": "run"}
    return case.row(about, value=float(held), provenance="counted", conditions=case.conditions())
