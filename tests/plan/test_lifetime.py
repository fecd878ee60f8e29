"""Hand counts of one life; what the command makes of it is test_break_even's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import TABLE
from isoforward.base.errors import BadInput
from isoforward.plan.lifetime import Assumptions, lengths, plan

LLAMA = ModelConfig(
    family="llama", layers=32, heads=32, kv_heads=8, width=4096, ffn=14336, context=8192, vocab=128256, tied=False
)


def test_a_token_decoded_alone_takes_its_weights_at_the_share_of_the_bandwidth_that_is_reached() -> None:
    made = plan(Assumptions(model=LLAMA, decode_mbu=0.5), TABLE["h100"])
    weights = 2 * (8030261248 - 128256 * 4096)  # the table is only looked up
    assert made.decoded_token_s(1, 1) == pytest.approx(weights / (0.5 * 3350e9), rel=1e-3)


def test_the_mean_of_drawn_lengths_is_what_was_asked() -> None:
    drawn = lengths(500, 1.0, np.arange(4000))
    assert drawn.mean() == pytest.approx(500, rel=0.02)
    assert drawn.min() >= 1


def test_a_model_that_does_not_fit_says_how_many_devices_it_needs() -> None:
    small = dataclasses.replace(TABLE["h100"], memory_bytes=10e9)
    with pytest.raises(BadInput, match=r"devices=1: serving needs .* write devices="):
        plan(Assumptions(model=LLAMA, decode_batch=1, prompt=1, new_tokens=1), small)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tokens": -1}, "tokens=-1"),
        ({"price_per_hour": 0}, "price_per_hour=0 must be positive"),
        ({"training_mfu": 0}, "training_mfu=0 must be a share"),
        ({"requests_per_day": -5}, "requests_per_day=-5"),
        ({"new_tokens": 0}, "new_tokens=0"),
    ],
)
def test_what_cannot_be_is_named(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Assumptions(model=LLAMA, **asked)
