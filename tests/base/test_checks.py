"""Keys that say where they are declared what they may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from isoforward.base.checks import Checked, at_least, duration_s, key, one_of, positive, sized, within
from isoforward.base.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Kiln(Checked):
    prefix = "kiln."
    fuel: str = key("wood", one_of, ("wood", "gas"))
    shelves: int = key(3, sized)
    firings: int | None = key(None, at_least, 2)
    share: float = key(0.5, within, 0, 1)
    heat: float = key(900.0, positive, 2000)
    time: str = key("8h", duration_s)
    name: str = "any"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fuel": "woood"}, "kiln.fuel=woood is not known: did you mean wood? choose one of wood, gas"),
        ({"shelves": 0}, "kiln.shelves=0 must be a finite number of at least 1"),
        ({"shelves": 2**22}, "kiln.shelves=4194304 is more than any has; it can be 2097152 at most"),
        ({"firings": 1}, "kiln.firings=1 must be a finite number of at least 2"),
        ({"share": float("nan")}, "kiln.share=nan must lie between 0 and 1"),
        ({"heat": 2000.0}, "kiln.heat=2000.0 must be a positive number"),
        ({"time": "soon"}, "kiln.time=soon is no duration; write 2h, 90m, 1h30m, HH:MM:SS or DD:HH:MM:SS"),
    ],
)
def test_a_value_that_will_not_do_is_refused_by_its_key(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        Kiln(**given)
    assert str(refused.value) == said


def test_defaults_and_what_is_not_set_pass() -> None:
    assert Kiln() == Kiln(firings=None) == replace(Kiln(), fuel="wood")
    assert Kiln().shelves == Kiln.shelves == 3
