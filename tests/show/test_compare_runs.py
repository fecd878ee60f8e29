"""Runs side by side: a ratio only where the machines are alike."""

from dataclasses import replace

import pytest

from isoforward.base.results import Results
from isoforward.show.compare_runs import differences, refusal, side_by_side
from tests.show.planted import ENVIRONMENT, PLANTED


@pytest.fixture
def here() -> Results:
    return replace(PLANTED, rows=tuple(replace(row, environment="here") for row in PLANTED.rows))


@pytest.fixture
def elsewhere(here: Results) -> Results:
    return replace(here, environments={"here": replace(ENVIRONMENT, identity={"cpu": "another"})})


def test_like_machines_are_compared_and_others_are_not(here: Results, elsewhere: Results) -> None:
    assert refusal(here, here) == ""
    assert "cpu" in refusal(here, elsewhere)
    assert "do not tell where" in refusal(here, PLANTED)


def test_what_differs_is_named(here: Results, elsewhere: Results) -> None:
    (row,) = differences([("a", here), ("b", elsewhere)]).rows
    assert [cell.text for cell in row] == ["cpu (machine)", "c", "another"]
    assert differences([("a", here), ("b", here)]).note.startswith("Nothing")


def test_ratios_are_to_the_first_run(here: Results, elsewhere: Results) -> None:
    slower = replace(
        here,
        rows=tuple(
            replace(row, value=2 * row.value, samples=tuple(2 * s for s in row.samples))
            if row.quantity == "time" and row.value is not None
            else row
            for row in here.rows
        ),
    )
    table = side_by_side([("a", here), ("b", slower)], 100)[-1].table
    assert table is not None and table.columns == ["", "a", "b", "÷ a"]
    times = [row[3].text for row in table.rows if "time of a token" in row[0].text]
    assert times and set(times) == {"2.00x"}
    table = side_by_side([("a", here), ("b", elsewhere)], 100)[-1].table
    assert table is not None and {row[3].text for row in table.rows} == {"not compared"}
