"""Every pass over both lives of one model, each in processes of its own, into one results file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from isoforward.base.results import Row, write
from isoforward.measure import transformers_lives
from isoforward.measure.case import Case
from isoforward.measure.cold import cold_rows
from isoforward.measure.memory import LIVES, account_rows
from isoforward.measure.passes import measure_apart
from isoforward.measure.train_and_serve import bench


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
