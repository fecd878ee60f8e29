"""The pictures of both lives, from rows whose figures are known by hand."""

from dataclasses import replace

import pytest

from isoforward.base.results import Results
from isoforward.show import phase_charts
from isoforward.show.charts import Chart
from isoforward.show.compare import compare
from tests.show.planted import PLANTED, row


def test_two_lives_are_drawn_a_token_at_a_time() -> None:
    chart = phase_charts.two_lives([("", compare(PLANTED))])
    assert "A token in training takes 400 ms" in chart.title
    assert "200 ms decoded alone" in chart.title


def test_serving_overtakes_training_where_the_costs_of_a_token_cross() -> None:
    chart = phase_charts.break_even(compare(PLANTED))
    assert isinstance(chart, Chart)
    ways = {(way["phase"], way["cost"]): way["served_tokens_per_trained_token"] for way in chart.table}
    assert ways["decode", "time"] == pytest.approx(0.4 / 0.2)
    assert ways["prefill", "time"] == pytest.approx(0.4 / 0.1)


def curve(*contexts: int) -> Results:
    more = [
        row("inference", "decode", context / 100, conditions={"tokens": 1, "context": context, "cache": cache})
        for context in contexts
        for cache in (True, False)
    ]
    kept = [one for one in PLANTED.rows if "cache" not in one.conditions]
    return replace(PLANTED, rows=(*kept, *more))


def test_the_cache_is_drawn_over_the_contexts_that_were_timed() -> None:
    chart = phase_charts.cache(curve(64, 128))
    assert isinstance(chart, Chart)
    assert [(point["cache"], point["context"]) for point in chart.table] == [
        (True, 64),
        (True, 128),
        (False, 64),
        (False, 128),
    ]


@pytest.mark.parametrize("trained", [640.0, 0.0])
def test_a_life_that_needed_no_page_of_its_own_is_drawn_without_a_ratio(trained: float) -> None:
    """As it is of a tiny model, whose few tensors fit into what the process had."""
    rows = [
        row(life, phase, value, quantity="memory", unit="byte", conditions={"category": category})
        for life, phase, value in (("training", "step", trained), ("inference", "forward", 0.0))
        for category in ("measured peak", "optimizer state")
    ]
    chart = phase_charts.memory([("", replace(PLANTED, rows=tuple(rows)))])
    assert isinstance(chart, Chart)
    assert chart.title == "Memory at its peak, by what it is kept for"


def test_what_cannot_be_drawn_says_what_is_missing() -> None:
    assert "several contexts" in str(phase_charts.cache(curve(64)))
    assert "no peak" in str(phase_charts.roofline(compare(PLANTED)))
