"""A question is answered by rows of the run, or not asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isoforward.base.results import Results, read
from isoforward.lesson.answers import measured

from .test_numbers import RECORDED
from .test_page import TEXT


@pytest.fixture(scope="module")
def recorded() -> Results:
    return read(RECORDED / "phase_costs" / "results.jsonl")


def test_ten_questions_are_answered_by_the_rows_of_a_run(recorded: Results) -> None:
    found = measured(recorded)
    answers = {each["name"]: each for each in found["questions"]}
    assert len(answers) == 10
    assert all(f"guess.{name}" in TEXT and f"guess.{name}.why" in TEXT for name in answers)
    assert answers["step_flops"]["value"] == pytest.approx(3)
    assert answers["cache_flops"]["at"] == {"context": 256}
    assert 0 < answers["activations"]["value"] < 1
    timed = [each for each in answers.values() if each["low"] is not None]
    assert {each["name"] for each in timed} == {
        "step_time", "backward_time", "forward_twice", "optimizer", "decode", "cache_time"
    }  # fmt: skip
    assert all((each["low"] or 0) <= each["value"] <= (each["high"] or 0) for each in timed)
    assert (found["lanes"] or {})["training"].keys() == {"forward", "loss", "backward", "optimizer"}
    assert found["doubts"]


def test_a_question_whose_rows_are_missing_or_doubled_is_left_out(recorded: Results) -> None:
    def names(results: Results) -> set[str]:
        return {each["name"] for each in measured(results)["questions"]}

    everything = names(recorded)
    without = [row for row in recorded.rows if (row.phase, row.quantity) != ("backward", "time")]
    assert names(replace(recorded, rows=tuple(without))) == everything - {"backward_time"}
    assert measured(replace(recorded, rows=tuple(without)))["lanes"] is None
    steps = [r for r in recorded.rows if r.phase == "step" and r.quantity == "time" and "cold" not in r.conditions]
    assert names(replace(recorded, rows=(*recorded.rows, *steps))) == everything - {"step_time", "optimizer", "decode"}
    assert names(replace(recorded, rows=())) == set()
    assert measured(None)["questions"] == []


def test_each_question_stands_alone_since_any_may_be_left_out(recorded: Results) -> None:
    asked = [TEXT[f"guess.{each['name']}"]["en"] for each in measured(recorded)["questions"]]
    assert len(asked) == 10
    assert not [each for each in asked if each.startswith("And ") or " that peak" in each or " those " in each]


def test_one_thread_is_one(recorded: Results) -> None:
    (where,) = recorded.environments.values()
    one = replace(where, identity={"cpu": "X", "threads": 1})
    assert measured(replace(recorded, environments={one.id: one}))["machine"] == "X, 1 thread"
