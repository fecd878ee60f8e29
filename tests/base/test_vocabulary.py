"""Every word of a row is declared once, with what it means; a row that uses another fails and names the nearest."""

from __future__ import annotations

import pytest

from isoforward.base.results import row_of
from isoforward.base.vocabulary import BESIDE, CONDITIONS, PHASES, QUANTITIES, WHOLES, Condition


def test_no_phase_is_declared_twice() -> None:
    words = (*PHASES, *BESIDE, *WHOLES)
    assert len(set(words)) == len(words)


def test_every_quantity_has_a_unit_and_a_meaning() -> None:
    assert [name for name, quantity in QUANTITIES.items() if not (all(quantity.units) and quantity.meaning)] == []
    assert [name for name, meaning in CONDITIONS.items() if not meaning] == []


def made(quantity: str = "time", phase: str = "forward", **conditions: Condition) -> object:
    return row_of("x", life="training", phase=phase, per="step", quantity=quantity, value=1.0, conditions=conditions)


def test_a_row_of_declared_words_is_one() -> None:
    made(batch=2)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [({"quantity": "tiem"}, "time"), ({"phase": "forwards"}, "forward"), ({"batsh": 2}, "batch")],
)
def test_a_row_of_another_word_fails_and_names_the_nearest(wrong: dict[str, str], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"is not declared: did you mean {nearest}"):
        made(**wrong)  # type: ignore[arg-type]
