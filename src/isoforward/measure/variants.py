"""Training steps under several settings: timed in one process, a step of each in every round; memory of each apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from isoforward.base.results import TRAINING, Row, write
from isoforward.measure.case import Case, Laps, apart, batch_of, master_of, record, row, timed
from isoforward.measure.train_and_serve import memory_rows, step_of, training_candidates, training_flops


def time_variants(cases: Sequence[Case], results: Path, command: str) -> str:
    """Appends the time and the FLOPs of each phase under each case, which its labels tell apart; the environment's id.

    What is measured and how often is the first case's.
    """
    packed = [case.pack() for case in cases]
    return str(apart(cases[0], "isoforward.measure.variants:time", results, command, cases=packed))


def time(packed: dict[str, Any]) -> str:
    cases = {str(n): Case.unpack(each) for n, each in enumerate(packed["cases"])}
    phased = {n: training_candidates(case, master_of(case), *batch_of(case))["phased"] for n, case in cases.items()}

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        for n, case in cases.items():
            for phase in (*TRAINING, "step"):
                about = {"life": "training", "phase": phase, "per": "step", "conditions": case.training()}
                yield row(case, **about, **timed([lap[phase] for lap in laps[n]]))
            yield from flop_rows(case)

    return record(packed, phased, tell)


def flop_rows(case: Case) -> Iterator[Row]:
    """What the device computes, recomputation too."""
    about: dict[str, Any] = {"life": "training", "quantity": "flops", "unit": "flop", "per": "step"}
    how = {"provenance": "counted", "convention": "hardware", "conditions": case.training()}
    for phase, count in training_flops(case, "hardware").items():
        yield row(case, **about, **how, phase=phase, value=float(count))


def weigh_variants(cases: Sequence[Case], results: Path, environment_id: str) -> None:
    """Appends the memory of a training step under each case: every phase's peak, and what the whole's is made of."""
    for case in cases:
        rows = memory_rows(case, step_of(case), "training", case.training())
        write(results, [dataclasses.replace(each, environment=environment_id) for each in rows])
