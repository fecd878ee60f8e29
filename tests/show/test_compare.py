"""Both lives side by side, by hand."""

from dataclasses import replace
from typing import Any

import pytest

from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row
from isoforward.show.compare import cache_curve, compare, memory_ledger, open_account
from tests.show.planted import PLANTED, row


def without(**fields: str) -> Results:
    def kept(row: Row) -> bool:
        return any(getattr(row, key) != value for key, value in fields.items())

    return replace(PLANTED, rows=tuple(filter(kept, PLANTED.rows)))


def test_the_sentence_is_made_of_the_rows() -> None:
    run = compare(PLANTED)
    assert run.time_ratio.value == pytest.approx(4.0 / 0.8)
    assert run.decode_ratio == pytest.approx(0.2 / (4.0 / 10))
    low, high = run.time_ratio.low, run.time_ratio.high
    assert run.headline == (
        f"Training this model costs 5.00x ({low:.2f}x to {high:.2f}x) its forward pass in time, 3.00x in FLOPs "
        "and 3.00x in memory; "
        "a decoded token takes 200 ms, 0.500x a trained one (400 ms)."
    )


def test_every_phase_has_its_share_of_the_step_and_its_time_of_a_token() -> None:
    backward = next(line for line in compare(PLANTED).training if line.phase == "backward")
    assert backward.share == pytest.approx(2.0 / 4.0)
    assert backward.time_per_token_s == pytest.approx(0.2)
    assert backward.flops_per_s == pytest.approx(200 / 2.0)


def test_the_doubts_of_the_verdict_come_along() -> None:
    assert "planted" in compare(PLANTED).warnings


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ({"quantity": "identity"}, "no row shows that both lives run the same forward"),
        ({"life": "training", "phase": "step", "quantity": "time"}, "are not both there"),
        ({"life": "inference", "phase": "decode", "quantity": "time"}, "decoded token is not there"),
    ],
)
def test_what_cannot_be_compared_says_why(missing: dict[str, str], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        compare(without(**missing))


def test_unlike_forwards_are_never_compared() -> None:
    identity, *rest = PLANTED.rows
    with pytest.raises(BadInput, match="3 logits of the frozen forward are not those of training"):
        compare(replace(PLANTED, rows=(replace(identity, value=3.0), *rest)))


def test_the_curve_of_the_cache_and_the_ledger_are_read_from_conditions() -> None:
    curve = cache_curve(PLANTED)
    assert [(context, row.value) for context, row in curve[True]] == [(64, 0.25)]
    assert [(context, row.value) for context, row in curve[False]] == [(64, 0.75)]
    assert memory_ledger(PLANTED, "training") == {"optimizer state": 640.0}


@pytest.mark.parametrize(
    ("low", "high", "open_"), [(0.002, 0.03, False), (0.012, 0.03, True), (-0.03, -0.011, True), (-0.02, 0.02, False)]
)
def test_an_account_is_open_only_where_the_whole_interval_says_so(low: float, high: float, open_: bool) -> None:
    about: dict[str, Any] = {"experiment": "e", "life": "training", "phase": "residual", "quantity": "time"}
    row = Row(**about, per="step", value=(low + high) / 2, low=low, high=high, interval="order statistics")
    assert open_account(row, 1.0) is open_


def test_a_step_that_another_optimizer_trained_is_told_with_adamw_too() -> None:
    def trained_by(one: Row) -> Row:
        return replace(one, conditions={**one.conditions, "optimizer": "muon"}) if one.phase == "step" else one

    usual = row("training", "step", 3.2, conditions={"tokens": 10, "optimizer": "adamw", "in_place_of": "muon"})
    run = compare(replace(PLANTED, rows=(*map(trained_by, PLANTED.rows), usual)))
    assert run.adamw_ratio is not None and run.adamw_ratio.value == pytest.approx(3.2 / 0.8)
    assert run.time_ratio.value == pytest.approx(4.0 / 0.8)
    assert "in memory (with AdamW in place of muon: 4.00x (" in run.headline
    assert "in time, 3.00x in FLOPs); a decoded" in run.headline
