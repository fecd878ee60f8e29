"""Which passes a model goes through, that all rows hold in one environment, and first executions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isoforward.base.config import ModelConfig
from isoforward.base.environment import environment
from isoforward.base.results import Row, read, write
from isoforward.measure import both_lives, transformers_lives
from isoforward.measure.case import Case
from isoforward.measure.train_and_serve import bench
from tests.measure.cases import SMALL

WRAPPED = Case(experiment="x", model=ModelConfig(source="transformers", path="there", vocab=32))


@pytest.mark.parametrize(
    ("case", "built", "beside"),
    [
        (SMALL, bench, ["training", "generation", "forward", "cold"]),
        (WRAPPED, transformers_lives.bench, ["wrapped training", "wrapped generation", "wrapped forward"]),
    ],
    ids=["ours", "wrapped"],
)
def test_every_pass_is_taken_and_its_rows_hold_where_it_was_timed(
    case: Case, built: object, beside: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, timed = environment("test", torch.device("cpu")), list[object]()

    def measure_apart(case: Case, build: object, *, results: Path, command: str) -> str:
        timed.append(build)
        write(results, [where])
        return where.id

    def rows(kind: str) -> Callable[..., list[Row]]:
        def made(case: Case, life: str = "cold") -> list[Row]:
            about = {"change": f"{kind}{life}"}
            return [case.row(life="training", phase="run", per="run", quantity="memory", value=1.0, conditions=about)]

        return made

    monkeypatch.setattr(both_lives, "measure_apart", measure_apart)
    monkeypatch.setattr(both_lives, "account_rows", rows(""))
    monkeypatch.setattr(both_lives, "cold_rows", rows(""))
    monkeypatch.setattr(transformers_lives, "memory_rows", rows("wrapped "))
    both_lives.measure_both_lives(case, tmp_path / "results.jsonl", "test")
    found = read(tmp_path / "results.jsonl").rows
    assert timed == [built]
    assert [row.conditions["change"] for row in found] == beside
    assert {row.environment for row in found} == {where.id}


def test_each_phase_has_one_row_that_says_it_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = list[object]()

    def call_apart(first: Callable[[Case, str], object], case: Case, life: str, **_: object) -> object:
        apart.append(life)
        return first(case, life)

    monkeypatch.setattr(both_lives, "call_apart", call_apart)
    rows = list(both_lives.cold_rows(SMALL))
    assert len(apart) == 2
    assert [row.phase for row in rows] == ["forward", "loss", "backward", "optimizer", "prefill", "decode"]
    assert all(row.conditions["cold"] is True and row.interval is None and not row.samples for row in rows)
    assert all(row.value is not None and row.value > 0 for row in rows)
