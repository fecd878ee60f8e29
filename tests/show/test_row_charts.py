"""Which conditions tell rows apart, and which picture they get."""

from isoforward.base.results import Row
from isoforward.show.row_charts import by_purpose, interval, of_rows, telling, variant, whole
from tests.show.planted import row


def timed(value: float, **conditions: str | int | float | bool) -> Row:
    return row("training", "forward", value, conditions=conditions)


def test_what_follows_from_another_condition_tells_nothing_more() -> None:
    rows = [timed(1, batch=b, tokens=8 * b, optimizer=w) for b in (1, 2, 4) for w in ("a", "b")]
    assert telling(rows) == ["batch", "optimizer"]


def test_how_a_sample_was_taken_tells_nothing() -> None:
    assert telling([timed(1, batch=1, executions=4), timed(1, batch=2, executions=2)]) == ["batch"]


def test_rows_over_a_number_become_a_curve_and_others_stand_one_by_one() -> None:
    curve = of_rows("x", [timed(b, batch=b) for b in (1, 2, 4)], ["batch"])
    assert curve is not None and curve.title == "Time per step, by batch"
    dots = of_rows("x", [timed(1, optimizer="a"), timed(2, optimizer="b")], ["optimizer"])
    assert dots is not None and dots.title == "Time per step"


def test_many_rows_are_cut_and_the_title_says_so() -> None:
    chart = of_rows("x", [timed(1, optimizer=f"way {n}") for n in range(500)], ["optimizer"])
    assert chart is not None and ": the first " in chart.title and chart.title.endswith(" of 500")


def test_rows_without_a_value_have_no_picture() -> None:
    missing = Row(
        experiment="x",
        life="training",
        phase="run",
        quantity="time",
        unit="s",
        per="run",
        value=None,
        provenance="unavailable",
        reason="it failed",
    )
    assert of_rows("x", [missing], []) is None


def test_a_ledger_adds_up_by_purpose_unless_a_peak_was_measured() -> None:
    held = {"activations.attention": 3.0, "activations.mlp": 4.0, "weights": 5.0}
    rows = [
        row("training", "step", v, quantity="memory", unit="byte", conditions={"category": k}) for k, v in held.items()
    ]
    assert by_purpose(rows)["activations"] == 7.0
    assert whole(rows) == 12.0
    peak = row("training", "step", 20.0, quantity="memory", unit="byte", conditions={"category": "measured peak"})
    assert whole([*rows, peak]) == 20.0


def test_a_row_is_named_by_what_singles_it_out() -> None:
    one = timed(1, checkpointing="full", batch=4)
    assert variant(one, ["checkpointing", "batch", "absent"]) == "checkpointing=full, batch=4"
    assert variant(one, ["checkpointing", "batch"], bare=True) == "full, batch=4"
    assert interval(one) == "no interval"
