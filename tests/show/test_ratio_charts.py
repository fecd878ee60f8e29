"""What a setting changes, phase by phase, as the report draws it."""

from dataclasses import replace
from typing import Any

import pytest

from isoforward.base.results import Row
from isoforward.show import ratio_charts
from isoforward.show.charts import Chart
from tests import planted

NOISE = (1.0, 1.02, 0.98, 1.01, 0.99, 1.03, 0.97, 1.0)


def timed(life: str, phase: str, seconds: float, *, pairs: int = len(NOISE), **conditions: Any) -> Row:
    return planted.timed(life, phase, "step", [seconds * each for each in NOISE[:pairs]], **conditions)


def changes(name: str, rows: list[Row]) -> Chart | None:
    return ratio_charts.changes(name, planted.results_of(rows))


def knob(**slower: float) -> list[Row]:
    """Each setting of `checkpointing`, and how much longer its backward takes."""
    return [
        timed(life, phase, (more if phase == "backward" else 1.0) * 1e-3, checkpointing=setting, tokens=128)
        for setting, more in slower.items()
        for life, phase in (("training", "forward"), ("training", "backward"), ("inference", "forward"))
    ]


def test_the_phase_that_a_setting_changes_is_told_from_those_that_it_leaves() -> None:
    chart = changes("one_knob", knob(none=1.0, full=1.4))
    assert chart is not None and chart.title == "Time with checkpointing=full, against checkpointing=none"
    told = {(each["life"], each["phase"]): (round(each["ratio"], 2), each["outcome"]) for each in chart.table}
    assert told == {
        ("training", "forward"): (1.0, "equal"),
        ("training", "backward"): (1.4, "slower"),
        ("inference", "forward"): (1.0, "equal"),
    }


def test_of_several_settings_each_stands_against_the_first() -> None:
    chart = changes("checkpointing", knob(none=1.0, selective=1.2, full=1.4))
    assert chart is not None and chart.title == "Time, against checkpointing=none"
    backward = [(each["checkpointing"], round(each["ratio"], 1)) for each in chart.table if each["phase"] == "backward"]
    assert backward == [("selective", 1.2), ("full", 1.4)]
    drawn = [mark["series"] for marks in chart.spec["datasets"].values() for mark in marks if "series" in mark]
    assert drawn[:2] == ["training forward, selective", "training forward, full"]


def test_each_place_is_compared_with_its_like() -> None:
    rows = [
        timed("inference", "prefill", prompt * slower * 1e-4, peer=peer, prompt=prompt)
        for peer, slower in (("ours", 1.0), ("theirs", 2.0))
        for prompt in (16, 128)
    ]
    rows += [
        timed("inference", "decode", 1e-3 * slower, peer=peer) for peer, slower in (("ours", 1.0), ("theirs", 3.0))
    ]
    chart = changes("peers", rows)
    assert chart is not None
    assert [(each["phase"], each.get("prompt"), round(each["ratio"], 1)) for each in chart.table] == [
        ("prefill", 16, 2.0),
        ("prefill", 128, 2.0),
        ("decode", None, 3.0),
    ]


def in_two(**at: Any) -> list[Row]:
    """The same in two phases."""
    return [timed("training", phase, 1.0, **at) for phase in ("forward", "loss")]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(in_two(way="a"), id="one setting"),
        pytest.param(knob(none=1.0, full=1.4)[1::3], id="one phase"),
        pytest.param(in_two(batch=1) + in_two(batch=2), id="a number"),
        pytest.param(in_two(layer="mlp") + in_two(layer="norm"), id="parts of a whole"),
        pytest.param(in_two(way="a") + in_two(way="b") + knob(none=1.0, full=1.4)[2::3], id="two kinds of setting"),
        pytest.param(
            [*in_two(way="a", batch=1), *in_two(way="b", batch=1), *in_two(way="a", batch=2)], id="one missing"
        ),
        pytest.param(in_two(way="a") + [replace(row, samples=(1.0, 1.1)) for row in in_two(way="b")], id="two samples"),
        pytest.param(in_two(way="a") + [replace(row, environment="b") for row in in_two(way="b")], id="another place"),
    ],
)
def test_what_is_no_setting_measured_in_two_phases_is_not_drawn_as_one(rows: Any) -> None:
    assert changes("planted", rows) is None


def test_samples_that_are_no_pairs_are_compared_by_their_medians() -> None:
    chart = changes("planted", in_two(way="a") + in_two(way="b", pairs=6))
    assert chart is not None
    assert {(each["interval"], each["outcome"]) for each in chart.table} == {("medians apart", "undecided")}


def test_pairs_that_were_timed_for_a_comparison_are_what_it_is_drawn_from() -> None:
    rows = in_two(way="a") + in_two(way="b", pairs=6)
    twice = planted.timed("training", "loss", "step", [2 * sample for sample in rows[1].samples], way="b")
    compared = planted.compared(twice, rows[1])
    chart = ratio_charts.changes("planted", planted.results_of(rows, [compared]))
    assert chart is not None
    assert [(each["phase"], round(each["ratio"], 1), each["interval"]) for each in chart.table] == [
        ("forward", 1.0, "medians apart"),
        ("loss", 2.0, "signed rank"),
    ]
