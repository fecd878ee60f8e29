"""What a terminal of 80 columns shows of any rows."""

import io
from typing import Any

import pytest
from rich.console import Console

from isoforward.base.results import Results, Row
from isoforward.base.vocabulary import Condition
from isoforward.show.compare import with_ends
from isoforward.show.tables import against_forward, fewest, shared, show_rows
from tests import planted


def row(phase: str, value: float, *, quantity: str = "time", per: str = "step", **conditions: Condition) -> Row:
    life = "inference" if phase in ("prefill", "decode") else "training"
    counted: dict[str, Any] = {"provenance": "counted", "convention": "model"} if quantity == "flops" else {}
    at: dict[str, Any] = {"experiment": "planted", "life": life, "phase": phase, "per": per}
    return Row(**at, quantity=quantity, value=value, conditions={"layers": 4} | conditions, **counted)


def shown(*rows: Row) -> str:
    written = io.StringIO()
    console = Console(file=written, width=80)
    show_rows(console, Results(rows=rows, environments={}, verdicts=(), warnings=()))
    return written.getvalue()


def test_what_rows_share_is_said_once_and_what_tells_them_apart_in_front() -> None:
    text = shown(row("forward", 0.002, context=64), row("forward", 0.004, context=128))
    assert text.splitlines()[0] == "layers 4"
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["context", "phase", "time", "±"],
        ["64", "forward", "2.00", "ms"],
        ["128", "forward", "4.00", "ms"],
    ]


def test_what_a_time_is_of_is_told_where_it_is_not_all_the_same() -> None:
    text = shown(row("step", 0.002), row("validation", 4.0, per="run"))
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["phase", "per", "time", "±"],
        ["step", "step", "2.00", "ms"],
        ["validation", "run", "4.00", "s"],
    ]


def test_every_quantity_has_a_table_of_its_own() -> None:
    text = shown(row("forward", 0.002), row("backward", 3e9, quantity="flops"))
    assert "2.00 ms" in text and "3.00 GFLOP" in text
    headings = [line.split()[1:] for line in text.splitlines() if "phase" in line]
    assert headings == [["time", "±"], ["flops"]]  # a count has no interval


def test_many_settings_with_long_names_stay_within_80_columns_and_whole() -> None:
    settings = {"optimizer": "muon with a long name", "checkpointing": "selective", "planted_in": "backward"}
    text = shown(row("optimizer", 1.0, **settings), row("prefill", 1.0, optimizer="adamw", checkpointing="none"))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_of_very_many_rows_the_first_are_shown_and_the_rest_counted() -> None:
    text = shown(*(row("decode", 1.0, context=n) for n in range(100)))
    assert "and 76 more, in the report" in text


def test_an_interval_is_told_with_its_kind_and_confidence() -> None:
    text = shown(planted.timed("training", "forward", "step", planted.noisy(1.0, n=12)), row("optimizer", 1.0))
    assert "± half the interval: order statistics, 0.961" in text.splitlines()


@pytest.mark.parametrize(
    ("slower", "noise", "told"), [(2.0, 0.01, "2.00x"), (1.0, 0.01, "equal"), (1.0, 0.1, "undecided")]
)
def test_a_ratio_is_shown_only_where_it_differs_from_one(slower: float, noise: float, told: str) -> None:
    samples = [slower * (1 + noise * each) for each in (0, -1, 1, -0.5, 0.5, 0, 0.2, -0.2)]
    pairs = [planted.timed("training", "forward", "step", samples)]
    pairs.append(planted.timed("inference", "forward", "step", [1.0] * 8))
    assert against_forward(planted.results_of(pairs).judge(*pairs)) == told


def test_a_ratio_of_too_few_rounds_is_said_to_be_one() -> None:
    pairs = [planted.timed("training", "forward", "step", [2.0, 2.1, 1.9, 2.0, 2.05])]
    pairs.append(planted.timed("inference", "forward", "step", [1.0] * 5))
    judged = planted.results_of(pairs).judge(*pairs)
    assert (judged.outcome, against_forward(judged)) == ("undecided", "too few rounds")
    assert with_ends(judged.ratio) == "2.00x (too few rounds, 1.90x to 2.10x)"


def test_columns_are_the_fewest_conditions_that_tell_rows_of_a_phase_apart() -> None:
    """Batch and prompt tell lives apart, which the phase does already; tokens and length follow from the batch."""

    def timed(life: str, phase: str, **conditions: str | int) -> Row:
        about = {"experiment": "x", "life": life, "phase": phase, "quantity": "time", "per": "step"}
        return Row(**about, value=1.0, conditions=conditions)  # type: ignore[arg-type]  # all of them are text

    rows = [
        timed(life, phase, checkpointing=way, **own)
        for way in ("none", "full")
        for life, phase, own in (
            ("training", "optimizer", {"batch": 8, "length": 256, "optimizer": "adamw"}),
            ("inference", "prefill", {"batch": 1, "prompt": 64, "new_tokens": 64}),
        )
    ]
    assert fewest(rows) == ["checkpointing"]
    assert shared(rows) == {}
    console = Console(width=80, file=io.StringIO(), record=True)
    show_rows(console, Results(rows=tuple(rows), environments={}, verdicts=(), warnings=()))
    shown = console.export_text()
    assert {"checkpointing", "optimizer", "inference", "prefill"} <= set(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_a_reading_does_not_stand_for_what_rows_are_of() -> None:
    """Every time is another, so that it alone would tell all rows apart, and nobody what they are."""
    rows = [
        row("run", 2.0, quantity="loss", adapter=adapter, step=step, training_time_s=step * 1.5 + len(adapter))
        for adapter in ("full", "head alone")
        for step in (10, 20)
    ]
    assert fewest(rows) == ["adapter", "step", "training_time_s"]
