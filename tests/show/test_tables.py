"""What a terminal of 80 columns shows of any rows."""

import io
from typing import Any

from rich.console import Console

from isoforward.base.results import Condition, Results, Row
from isoforward.show.tables import show_rows


def row(phase: str, value: float, *, quantity: str = "time", unit: str = "s", **conditions: Condition) -> Row:
    life = "inference" if phase in ("prefill", "decode") else "training"
    counted: dict[str, Any] = {"provenance": "counted", "convention": "model"} if quantity == "flops" else {}
    at: dict[str, Any] = {"experiment": "planted", "life": life, "phase": phase, "per": "step"}
    return Row(**at, quantity=quantity, unit=unit, value=value, conditions={"layers": 4} | conditions, **counted)


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


def test_every_quantity_has_a_table_of_its_own() -> None:
    text = shown(row("forward", 0.002), row("backward", 3e9, quantity="flops", unit="flop"))
    assert "2.00 ms" in text and "3.00 GFLOP" in text
    assert [line.split()[-2] for line in text.splitlines() if line.endswith("±")] == ["time", "flops"]


def test_many_settings_with_long_names_stay_within_80_columns_and_whole() -> None:
    settings = {"optimizer": "muon with a long name", "checkpointing": "selective", "planted in": "backward"}
    text = shown(row("optimizer", 1.0, **settings), row("prefill", 1.0, optimizer="adamw", checkpointing="none"))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_of_very_many_rows_the_first_are_shown_and_the_rest_counted() -> None:
    text = shown(*(row("decode", 1.0, context=n) for n in range(100)))
    assert "and 76 more, in the report" in text
