"""First executions: every phase of both lives, a sample each, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from isoforward.base.config import MeasureConfig, ModelConfig
from isoforward.measure import cold
from isoforward.measure.benchmark import Part
from isoforward.measure.case import Case

CASE = Case(
    experiment="x",
    model=ModelConfig(layers=1, heads=2, width=16, context=32, vocab=32),
    batch=2,
    length=16,
    measure=MeasureConfig(prompt=4, new_tokens=4),
)


def test_each_phase_has_one_row_that_says_it_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = list[object]()

    def call_apart(life: Callable[[Case], list[tuple[Part, float]]], case: Case, **_: object) -> object:
        apart.append(life)
        return life(case)

    monkeypatch.setattr(cold, "call_apart", call_apart)
    rows = list(cold.cold_rows(CASE))
    assert len(apart) == 2
    assert [row.phase for row in rows] == ["forward", "loss", "backward", "optimizer", "prefill", "decode"]
    assert all(row.conditions["cold"] is True and row.interval is None and not row.samples for row in rows)
    assert all(row.value is not None and row.value > 0 for row in rows)
