"""Hand counts of one life; what the command makes of it is test_break_even's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.datasheets import TABLE
from isoforward.base.errors import BadInput
from isoforward.model import cost
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


H100 = TABLE["h100"]
GRPO = plan(Assumptions(model=LLAMA, method="grpo", tokens=1e9, prompt=512, new_tokens=256, decode_batch=64), H100)


def test_an_adapters_token_costs_its_exact_share_and_no_bare_one() -> None:
    """Of a base whose own gradients are saved a token costs 4 a weight, not 6."""
    adapter = AdapterConfig(name="lora", rank=8, targets=["q", "v"])
    short: dict[str, Any] = {"model": LLAMA, "tokens": 1e9, "training_length": 128}
    full, lora = (plan(Assumptions(adapter=each, **short), H100) for each in (AdapterConfig(), adapter))
    assert 0.665 < lora.trained_token_flops / full.trained_token_flops < 0.675
    assert "FLOPs, 6ND/2N" in full.training() and "FLOPs, 6ND/2N" not in lora.training()
    with pytest.raises(BadInput, match="'x' matches nothing"):
        plan(Assumptions(model=LLAMA, tokens=1e9, adapter=AdapterConfig(name="lora", targets=["x"])), H100)


def test_a_grpo_update_takes_its_flops_at_the_assumed_share_of_the_peak() -> None:
    found = GRPO.grpo_step_s(batch=64, prompt=512, new=256, epochs=2)
    forward = cost.forward_flops(LLAMA, batch=64, length=767).total
    assert found["forward"] == pytest.approx(2 * forward / (989.4e12 * 0.4), rel=0.01)
    assert found["backward"] == pytest.approx(2 * found["forward"])


def test_a_rollouts_decode_is_bound_by_weights_and_caches() -> None:
    """By hand: 255 steps that read 15 GB of weights, and keys and values of 64 answers, at 3/4 of 3.35 TB/s."""
    weights = 2 * (8030261248 - 128256 * 4096)
    cached = 64 * 2 * 32 * 1024 * 2 * (512 + 128)
    found = GRPO.grpo_step_s(batch=64, prompt=512, new=256)
    assert found["decode"] == pytest.approx(255 * (weights + cached) / (3.35e12 * 0.75), rel=0.02)


def test_longer_answers_are_more_rollout_and_more_epochs_less() -> None:
    def share(new: int, epochs: int = 1) -> float:
        times = GRPO.grpo_step_s(batch=64, prompt=512, new=new, epochs=epochs)
        return (times["hand-over"] + times["prefill"] + times["decode"]) / sum(times.values())

    assert share(1) < share(64) < share(256) < share(1024)
    assert share(256, epochs=4) < share(256)


def test_a_token_of_grpo_is_its_share_of_the_whole_step() -> None:
    whole_s = sum(GRPO.grpo_step_s(batch=64, prompt=512, new=256).values())
    assert GRPO.trained_token_s == pytest.approx(whole_s / (64 * 768))
    supervised = plan(Assumptions(model=LLAMA, tokens=1e9), H100)
    assert GRPO.trained_token_s > supervised.trained_token_s


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tokens": -1}, "tokens=-1"),
        ({"price_per_hour": 0}, "price_per_hour=0 must be positive"),
        ({"training_mfu": 0}, "training_mfu=0 must be a share"),
        ({"requests_per_day": -5}, "requests_per_day=-5"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"method": "ppo"}, "method=ppo is not known: choose one of supervised, grpo"),
        ({"method": "grpo"}, "tokens= is not set"),
        ({"method": "grpo", "tokens": 1e9, "adapter": AdapterConfig(name="lora")}, "leave out adapter="),
    ],
)
def test_what_cannot_be_is_named(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Assumptions(model=LLAMA, **asked)
