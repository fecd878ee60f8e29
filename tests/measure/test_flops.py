from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.measure.flops import (
    FlopCounter,
    Scope,
    by_phase,
    count_decode,
    count_decode_uncached,
    count_prefill,
    count_training,
    layers_of,
)
from isoforward.model import cost, steps
from isoforward.model.gpt import GPT

B, T, V = 2, 24, 101

GPT2 = ModelConfig(family="gpt2", layers=12, heads=12, width=768, context=1024, vocab=50257)
LLAMA3_70B = ModelConfig(
    family="llama", layers=80, heads=64, kv_heads=8, width=8192, ffn=28672, context=8192, vocab=128256, tied=False
)


def small(**chosen: Any) -> ModelConfig:
    return ModelConfig(**{"layers": 2, "heads": 4, "width": 48, "context": 32, "vocab": V, **chosen})


def products_by_hand(c: ModelConfig, *, tokens: int, pairs: int, logits: int) -> dict[str, int]:
    """Every matrix product of a forward, written out: rows x inner x columns x 2."""
    kv = c.kv_head_count * (c.width // c.heads)
    ffn_in = c.ffn_width * (2 if c.family == "llama" else 1)
    return {
        "projections": c.layers * tokens * 2 * (c.width * c.width + 2 * c.width * kv + c.width * c.width),
        "scores": c.layers * 2 * (2 * pairs * c.width),
        "mlp_in": c.layers * tokens * 2 * c.width * ffn_in,
        "mlp_out": c.layers * tokens * 2 * c.ffn_width * c.width,
        "head": logits * 2 * c.width * c.vocabulary,
    }


families = pytest.mark.parametrize("family", ["gpt2", "llama"])
grouped = pytest.mark.parametrize("kv_heads", [None, 2, 1])
tying = pytest.mark.parametrize("tied", [True, False])


@families
@grouped
@tying
def test_a_training_step_counts_what_is_counted_by_hand(family: str, kv_heads: int | None, tied: bool) -> None:
    c = small(family=family, kv_heads=kv_heads, tied=tied)
    hand = products_by_hand(c, tokens=B * T, pairs=B * T * T, logits=B * T)
    forward = sum(hand.values())
    assert count_training(c, batch=B, length=T) == {
        "forward": forward,
        "loss": 0,
        "backward": 2 * forward,
        "optimizer": 0,
    }


def test_gpt2_at_1024_tokens_counts_what_nanogpt_publishes() -> None:
    """transformer_sizing.ipynb: 291648307200 forward, 583296614400 backward."""
    counted = count_training(GPT2, batch=1, length=1024)
    assert (counted["forward"], counted["backward"]) == (291_648_307_200, 583_296_614_400)


def test_a_70b_model_is_counted_without_its_weights() -> None:
    prompt = products_by_hand(LLAMA3_70B, tokens=8192, pairs=8192**2, logits=1)
    assert count_prefill(LLAMA3_70B, batch=1, length=8192) == sum(prompt.values())


@pytest.mark.slow
def test_a_training_step_of_a_70b_model_is_counted_without_its_weights() -> None:
    hand = products_by_hand(LLAMA3_70B, tokens=8192, pairs=8192**2, logits=8192)
    counted = count_training(LLAMA3_70B, batch=1, length=8192)
    assert (counted["forward"], counted["backward"]) == (sum(hand.values()), 2 * sum(hand.values()))


@families
def test_a_causal_mask_leaves_the_triangle_with_its_diagonal(family: str) -> None:
    c = small(family=family)
    hand = products_by_hand(c, tokens=B * T, pairs=B * T * (T + 1) // 2, logits=B * T)
    counted = count_training(c, batch=B, length=T, convention="causal")
    assert (counted["forward"], counted["backward"]) == (sum(hand.values()), 2 * sum(hand.values()))


@families
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_hardware_counts_recomputation_up_to_the_last_thing_kept(family: str, dropout: float) -> None:
    """A fused backward of attention is 5 products for 2. torch stops recomputing a block when it has all that it had
    saved: the last product's input, or, with dropout behind it, the mask."""
    c = small(family=family, dropout=dropout)
    hand = products_by_hand(c, tokens=B * T, pairs=B * T * T, logits=B * T)
    fused = 2 * sum(hand.values()) + hand["scores"] // 2
    blocks = sum(hand.values()) - hand["head"]
    recomputed = {"none": 0, "selective": 0, "full": blocks if dropout else blocks - hand["mlp_out"]}
    for checkpointing, again in recomputed.items():
        counted = count_training(c, batch=B, length=T, checkpointing=checkpointing, convention="hardware")
        assert (counted["forward"], counted["backward"]) == (sum(hand.values()), fused + again)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputation_is_no_work_of_the_model(checkpointing: str) -> None:
    assert count_training(small(), batch=B, length=T, checkpointing=checkpointing) == count_training(
        small(), batch=B, length=T
    )


def test_micro_batches_add_up_to_the_step() -> None:
    assert count_training(small(), batch=4, length=T, accumulate=4) == count_training(small(), batch=4, length=T)


@families
@grouped
def test_serving_counts_the_head_at_one_position(family: str, kv_heads: int | None) -> None:
    c = small(family=family, kv_heads=kv_heads)
    prompt = products_by_hand(c, tokens=B * T, pairs=B * T * T, logits=B)
    assert count_prefill(c, batch=B, length=T) == sum(prompt.values())
    assert count_decode_uncached(c, batch=B, length=T) == sum(prompt.values())
    token = products_by_hand(c, tokens=B, pairs=B * (T + 1), logits=B)
    assert count_decode(c, batch=B, cached=T) == sum(token.values())


def test_a_text_decoded_token_by_token_costs_what_one_causal_forward_costs() -> None:
    one_by_one = count_prefill(small(), batch=B, length=1) + sum(
        count_decode(small(), batch=B, cached=past) for past in range(1, 8)
    )
    assert one_by_one == count_training(small(), batch=B, length=8, convention="causal")["forward"]


def test_muon_counts_newton_schulz_for_each_of_the_fused_matrices() -> None:
    """Jordan 2024: five steps of 2(2nm^2 + m^3) for an n x m matrix, m <= n."""
    c = small(family="llama", kv_heads=2)

    def five(n: int, m: int) -> int:
        n, m = max(n, m), min(n, m)
        return 5 * 2 * (2 * n * m * m + m**3)

    queries_keys_values = five(48, 48) + 2 * five(24, 48)
    mlp = 3 * five(c.ffn_width, 48)
    counted = count_training(c, batch=B, length=T, optim=OptimConfig(name="muon"))
    assert counted["optimizer"] == 2 * (queries_keys_values + five(48, 48) + mlp)


@families
def test_each_kind_of_layer_has_its_own_products_in_both_directions(family: str) -> None:
    c = small(family=family, kv_heads=2)
    hand = products_by_hand(c, tokens=B * T, pairs=B * T * T, logits=B * T)
    expected = {
        "attention": hand["projections"] + hand["scores"],
        "mlp": hand["mlp_in"] + hand["mlp_out"],
        "head": hand["head"],
    }
    flops = on_cpu(c)
    for phase, factor in (("forward", 1), ("backward", 2)):
        found = {kind: count for (at, kind), count in flops.items() if at == phase and count}
        assert found == {kind: factor * count for kind, count in expected.items()}


def on_cpu(config: ModelConfig, plant: str | None = None, side: int = 8) -> Counter[tuple[str, str]]:
    """A real step, by phase and kind of layer; at the start of `plant` an extra product of two side x side matrices."""
    torch.manual_seed(0)
    model = GPT(config)
    scope = Scope(layers_of(model))
    extra = torch.ones(side, side)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with scope(name):
            if name == plant:
                extra @ extra
            yield

    tokens = torch.randint(V, (B, T))
    with scope.following(), FlopCounter(scope) as counter:
        steps.train_step(model, torch.optim.AdamW(model.parameters()), tokens, tokens, phase=phase)
    return counter.flops


def test_the_count_on_meta_is_that_of_the_real_step() -> None:
    assert by_phase(on_cpu(small())) == count_training(small(), batch=B, length=T)


@pytest.mark.parametrize("plant", ["forward", "loss", "backward", "optimizer"])
def test_a_planted_product_is_found_in_its_phase_and_in_no_other(plant: str) -> None:
    clean, planted = by_phase(on_cpu(small())), by_phase(on_cpu(small(), plant))
    assert {phase: planted[phase] - clean[phase] for phase in planted} == {
        phase: 2 * 8**3 if phase == plant else 0 for phase in clean
    }


def test_attention_is_torchs_own_again_afterwards() -> None:
    before = F.scaled_dot_product_attention
    count_prefill(small(), batch=1, length=4)
    assert F.scaled_dot_product_attention is before


@settings(max_examples=6, deadline=None)
@given(
    family=st.sampled_from(["gpt2", "llama"]),
    layers=st.integers(1, 2),
    heads_and_kv=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (6, 1)]),
    head_width=st.sampled_from([2, 6, 16]),
    tied=st.booleans(),
    batch=st.integers(1, 3),
    length=st.integers(2, 20),
    convention=st.sampled_from(["model", "causal", "hardware"]),
    checkpointing=st.sampled_from(["none", "selective", "full"]),
)
def test_the_analytic_model_gives_the_same_counts(
    family: str,
    layers: int,
    heads_and_kv: tuple[int, int],
    head_width: int,
    tied: bool,
    batch: int,
    length: int,
    convention: str,
    checkpointing: str,
) -> None:
    heads, kv_heads = heads_and_kv
    c = small(family=family, layers=layers, heads=heads, kv_heads=kv_heads, width=heads * head_width, tied=tied)
    size: dict[str, Any] = {"batch": batch, "length": length, "convention": convention}
    counted = count_training(c, checkpointing=checkpointing, **size)
    assert counted["forward"] == cost.forward_flops(c, **size).total
    assert counted["backward"] == cost.backward_flops(c, checkpointing=checkpointing, **size).total
    assert count_prefill(c, **size) == cost.forward_flops(c, logits="last", **size).total
    decoded = count_decode(c, batch=batch, cached=length, convention=convention)
    assert decoded == cost.decode_flops(c, batch=batch, cached=length, convention=convention).total
    uncached = count_decode_uncached(c, **size)
    assert uncached == cost.decode_flops(c, batch=batch, cached=length - 1, cache=False, convention=convention).total
