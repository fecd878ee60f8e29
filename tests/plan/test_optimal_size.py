"""Sardana 2024's published result, and the law's own optimum."""

from __future__ import annotations

import math

import pytest

from isoforward.base.datasheets import TABLE
from isoforward.base.errors import BadInput
from isoforward.model import cost
from isoforward.plan.lifetime import Assumptions
from isoforward.plan.optimal_size import (
    cheapest,
    chinchilla_tokens,
    lifetime_flops,
    lives,
    loss,
    shape,
    sizes_below,
    tokens_for,
)

LIKE_13B = loss(13e9, chinchilla_tokens(13e9))


def best(served: float) -> tuple[float, float]:
    return cheapest(sizes_below(15e9), lambda size: lifetime_flops(LIKE_13B, size, served))


def test_13b_and_2t_served_tokens_is_figure_1_of_the_paper() -> None:
    """ "can reduce their total compute by 1.7 x 10^22 FLOPs (17%) by instead training a 7B model on more data"."""
    size, flops = best(2e12)
    before = lifetime_flops(LIKE_13B, 13e9, 2e12)
    assert size == pytest.approx(7e9, rel=0.02)
    assert before - flops == pytest.approx(1.7e22, rel=0.01)
    assert 1 - flops / before == pytest.approx(0.17, abs=0.005)


def test_with_nothing_served_the_size_asked_for_is_the_cheapest() -> None:
    """That is what Chinchilla's tokens mean."""
    assert best(0)[0] == pytest.approx(13e9, rel=0.02)


def test_more_served_tokens_never_want_a_larger_model() -> None:
    found = [best(10.0**power)[0] for power in range(9, 16)]
    assert found == sorted(found, reverse=True)


def test_a_model_too_small_never_reaches_the_loss() -> None:
    assert math.isinf(tokens_for(LIKE_13B, 5e8))
    assert loss(13e9, tokens_for(LIKE_13B, 13e9)) == pytest.approx(LIKE_13B)
    with pytest.raises(BadInput, match="no size reaches"):
        cheapest([1e8], lambda size: lifetime_flops(LIKE_13B, size, 1e12))


def test_shapes_are_those_of_llama_1() -> None:
    """Touvron 2023, table 2: 32 x 4096 and 40 x 5120 are 6.7B and 13.0B with as many key heads as query heads."""
    assert cost.parameters(shape(32)).total == pytest.approx(6.7e9, rel=0.15)
    assert cost.parameters(shape(40)).total == pytest.approx(13.0e9, rel=0.15)


def test_in_device_time_decode_bound_by_bandwidth_moves_the_optimum_down() -> None:
    """At batch 1 a served token takes many times its FLOPs' share; at a large batch the two agree more."""

    def wanted(batch: int) -> int:
        asked = Assumptions(decode_batch=batch, prompt=100, new_tokens=400)
        every = lives(LIKE_13B, asked, TABLE["h100"], largest=15e9)
        return min(every, key=lambda life: life.cost("device time", 2e12)).parameters

    assert wanted(1) < wanted(16) < best(2e12)[0] * 1.1


def test_costs_of_a_life_are_training_and_each_served_token() -> None:
    life = lives(LIKE_13B, Assumptions(), TABLE["h100"], largest=15e9)[-1]
    trained = life.trained["FLOPs, 6ND/2N"]
    assert trained == pytest.approx(6 * life.parameters * life.tokens, rel=1e-6)
    assert life.cost("FLOPs, 6ND/2N", 1e12) == pytest.approx(trained + 2 * life.parameters * 1e12, rel=1e-6)
