from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from isoforward.base.config import AdapterConfig, ModelConfig, OptimConfig
from isoforward.formats.export import freeze
from isoforward.measure.flops import fused_attention
from isoforward.measure.memory_ledger import Ledger, inference_ledger, training_ledger
from isoforward.model import footprint, steps
from isoforward.model.adapter_cost import adapted_training_state
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.optim import build
from isoforward.serve.inference import DTYPES

B, T, V, C, L, H = 2, 24, 101, 48, 3, 4
BTC = B * T * C * 4  # bytes in fp32

TRAINING = ("forward", "loss", "backward", "optimizer")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**chosen: Any) -> ModelConfig:
    return ModelConfig(**{"layers": L, "heads": H, "width": C, "context": 32, "vocab": V, **chosen})


def second_step(
    c: ModelConfig,
    *,
    dtype: str = "fp32",
    checkpointing: str = "none",
    adapter: AdapterConfig | None = None,
    step: Callable[..., object] = steps.train_step,
) -> Ledger:
    """The first one makes Adam's state."""
    torch.manual_seed(0)
    model = adapt(GPT(c, dtype=DTYPES[dtype], checkpointing=checkpointing), adapter or AdapterConfig())
    optimizer = build(model, OptimConfig())
    tokens = torch.randint(V, (B, T))
    steps.train_step(model, optimizer, tokens, tokens)
    return training_ledger(model, optimizer, tokens, tokens, step=step)


def parameters_of(c: ModelConfig) -> list[Tensor]:
    return list(GPT(c).parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_fp32_adam_is_16_bytes_a_parameter(family: str, tied: bool) -> None:
    c = config(family=family, tied=tied)
    held = second_step(c).phases["optimizer"]
    count, tensors = sum(p.numel() for p in parameters_of(c)), len(parameters_of(c))
    assert held["parameters"] == held["gradients"] == 4 * count
    assert held["optimizer state"] == 8 * count + 4 * tensors  # each tensor counts its own steps
    assert held["parameters"] + held["gradients"] + held["optimizer state"] == 16 * count + 4 * tensors


def test_adams_state_is_not_there_before_its_first_step() -> None:
    model = GPT(config())
    tokens = torch.zeros(B, T, dtype=torch.long)
    ledger = training_ledger(model, build(model, OptimConfig()), tokens, tokens)
    assert "optimizer state" not in ledger.phases["backward"]
    assert ledger.phases["optimizer"]["optimizer state"] > ledger.phases["optimizer"]["parameters"]


def test_gpt2_keeps_the_activations_that_a_hand_count_finds() -> None:
    """llm.c's list of them, less what no backward reads: with flash attention the T x T scores, and sums' operands."""
    kept = {k: v for k, v in second_step(config()).phases["loss"].items() if k.startswith("activations")}
    statistics = B * T * 4  # a mean, or a deviation, of every position
    assert kept == {
        "activations.embedding": BTC + 8 * T,  # and the positions' indices
        "activations.residual": L * 2 * BTC,
        "activations.norm": (2 * L + 1) * (BTC + 2 * statistics),
        "activations.attention": L * (3 * BTC + BTC + H * statistics),  # q, k, v; the result; its log-sum-exp
        "activations.mlp": L * (4 * BTC + 4 * BTC),  # before and after GELU
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_over_int8_holds_a_byte_a_frozen_weight_and_adam_of_the_maps_alone(family: str) -> None:
    """Counted by hand: of a block's matrices a byte a weight and a scale an output; what is beside them in fp32."""
    c, rank = config(family=family), 4
    over_int8 = AdapterConfig(name="lora", rank=rank, targets=["q", "v"], base="int8")
    ledger = second_step(c, adapter=over_int8)
    held, count = ledger.phases["optimizer"], sum(p.numel() for p in parameters_of(c))
    F = c.ffn_width
    shapes = [(3 * C, C), (C, C), *([(F, C), (C, F)] if family == "gpt2" else [(2 * F, C), (C, F)])]
    matrices, scales = L * sum(out * width for out, width in shapes), L * sum(out for out, _ in shapes)
    maps, tensors = L * 2 * rank * (C + C), L * 2 * 2  # an A and a B beside q, and beside v
    assert held["parameters"] == matrices + 4 * (scales + count - matrices + maps)
    assert held["gradients"] == 4 * maps
    assert held["optimizer state"] == 8 * maps + 4 * tensors
    predicted = adapted_training_state(c, over_int8)
    assert predicted.total == sum(held[name] for name in ("parameters", "gradients", "optimizer state")) - 4 * tensors
    assert not ledger.retained


def test_lora_keeps_the_same_activations_over_int8_as_over_fp32() -> None:
    """No decoded weight outlives its product."""
    adapter = AdapterConfig(name="lora", rank=4, targets=["q", "v"])
    kept = [
        {name: size for name, size in second_step(config(), adapter=each).phases["loss"].items() if "activ" in name}
        for each in (adapter, replace(adapter, base="int8"))
    ]
    assert kept[0] == kept[1] and sum(kept[0].values()) > L * BTC


def test_full_checkpointing_keeps_one_input_a_layer() -> None:
    ledger = second_step(config(), checkpointing="full")
    kept = {k: v for k, v in ledger.phases["loss"].items() if k.startswith("activations")}
    assert kept == {
        "activations.embedding": BTC + 8 * T,  # the first layer's
        "activations.residual": L * BTC,  # the others', and the last norm's
        "activations.norm": BTC + 2 * B * T * 4,
    }
    assert ledger.phases["backward"]["recomputed"] > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_analytic_model_keeps_the_same_bytes(family: str, dtype: str, checkpointing: str) -> None:
    c = config(family=family, kv_heads=2)
    held = second_step(c, dtype=dtype, checkpointing=checkpointing).phases["loss"]
    kept = sum(v for k, v in held.items() if k.startswith("activations")) + held.get("cast weights", 0)
    rotation = 2 * T * (C // H) * DTYPES[dtype].itemsize
    positions = {"gpt2": 8 * T, "llama": rotation}  # looked up once for all layers
    predicted = footprint.saved_bytes(c, batch=B, length=T, dtype=dtype, checkpointing=checkpointing)
    assert kept == predicted.total + positions[family]


def test_logits_are_there_once_after_the_loss_and_twice_and_a_slice_in_its_backward() -> None:
    held = second_step(config(vocab=4096)).phases
    logits, norms = B * T * 4096 * 4, B * T * 4
    for phase, size in (("forward", logits), ("loss", logits + norms), ("backward", 3 * logits + norms)):
        assert size <= held[phase]["logits and loss"] < size + 8 * norms  # indices of targets, and which count


def test_bf16_pays_for_a_copy_of_every_weight_it_multiplies_by() -> None:
    c = config(family="llama", tied=False)
    matrices = sum(p.numel() for p in parameters_of(c)) - V * C  # all but the token table
    assert second_step(c, dtype="bf16").phases["loss"]["cast weights"] == 2 * matrices


def test_the_same_step_has_the_same_ledger() -> None:
    assert second_step(config()) == second_step(config())


def test_following_a_step_does_not_change_it() -> None:
    def weights(step: Callable[..., object]) -> list[Tensor]:
        torch.manual_seed(0)
        model = GPT(config(dropout=0.1), checkpointing="full")
        optimizer = build(model, OptimConfig())
        tokens = torch.randint(V, (B, T))
        step(model, optimizer, tokens, tokens)
        return list(model.parameters())

    pairs = zip(weights(steps.train_step), weights(training_ledger), strict=True)
    assert all(torch.equal(plain, followed) for plain, followed in pairs)


def planting(where: str, plant: Callable[[], object]) -> Callable[..., object]:
    def step(*parts: Any, phase: steps.Phase) -> object:
        @contextmanager
        def planted(name: str) -> Iterator[None]:
            with phase(name):
                if name == where:
                    plant()
                yield

        return steps.train_step(*parts, phase=planted)

    return step


@pytest.mark.parametrize("where", TRAINING)
def test_a_planted_tensor_that_stays_is_found_from_its_phase_on(where: str) -> None:
    kept: list[Tensor] = []
    clean = second_step(config())
    planted = second_step(config(), step=planting(where, lambda: kept.append(torch.zeros(1000))))
    assert clean.retained == {}
    assert planted.retained == {where: 4000}
    since = TRAINING.index(where)
    for number, phase in enumerate(TRAINING):
        extra = {"retained": 4000} if number >= since else {}
        assert planted.phases[phase] == clean.phases[phase] | extra


@pytest.mark.parametrize("where", TRAINING)
def test_a_planted_tensor_that_goes_is_found_in_its_phase_alone(where: str) -> None:
    clean = second_step(config())
    planted = second_step(config(), step=planting(where, lambda: torch.zeros(10**7)))
    assert planted.retained == {}
    assert planted.peak_phase == where
    if where == "loss":
        assert planted.categories["logits and loss"] == 4 * 10**7 + B * T * V * 4
    else:
        assert planted.categories["temporaries"] == 4 * 10**7
    assert {p: c for p, c in planted.phases.items() if p != where} == {
        p: c for p, c in clean.phases.items() if p != where
    }


def test_the_peak_is_that_of_the_fullest_phase_and_its_categories_add_up() -> None:
    ledger = second_step(config())
    assert ledger.peak_bytes == max(ledger.peaks.values()) == sum(ledger.categories.values())
    assert list(ledger.phases) == list(TRAINING)


def served(c: ModelConfig, *, cached: bool, new_tokens: int = 4) -> Ledger:
    model = freeze(GPT(c))
    cache = KVCache(c, batch=B, capacity=T + new_tokens - 1, dtype=torch.float32) if cached else None
    return inference_ledger(model, torch.zeros(B, T, dtype=torch.long), cache, new_tokens=new_tokens)


def test_serving_holds_weights_and_the_kv_cache_and_little_else() -> None:
    ledger = served(config(kv_heads=2), cached=True)
    weights = 4 * sum(p.numel() for p in parameters_of(config(kv_heads=2)))
    cache = 2 * L * B * 2 * (C // H) * (T + 3) * 4  # keys and values of two heads
    for phase in ("prefill", "decode"):
        assert ledger.phases[phase]["weights"] == weights
        assert ledger.phases[phase]["KV cache"] == cache
    assert ledger.retained == {}


def test_prefill_peaks_in_the_mlp_which_holds_eleven_times_the_width() -> None:
    """The layer's input, the residual, its norm (1 each), before and after GELU (4 each); mask and positions beside."""
    transients = served(config(), cached=True).phases["prefill"]["transients"]
    assert transients == 11 * BTC + T * T + 8 * T


def test_without_a_cache_every_token_holds_what_a_prefill_holds() -> None:
    ledger = served(config(), cached=False)
    assert list(ledger.phases) == ["decode"]
    assert "KV cache" not in ledger.categories
    assert ledger.categories["transients"] == pytest.approx(11 * BTC * (T + 3) / T, rel=0.02)


def test_with_nothing_to_generate_the_whole_forward_is_followed() -> None:
    """At its end: logits of every position, and what they were made of: the norm's result."""
    c = config(vocab=4096)
    ledger = inference_ledger(freeze(GPT(c)), torch.zeros(B, T, dtype=torch.long), new_tokens=0)
    assert list(ledger.phases) == ["forward"]
    assert ledger.categories["transients"] == B * T * 4096 * 4 + BTC


class Greedy:
    """A memory in which every operator takes a gigabyte and gives it back."""

    taken = 10**9

    def now(self) -> int:
        return 0

    def peak(self) -> int:
        return self.taken

    def reset(self) -> None:
        pass


def test_what_a_kernel_takes_beside_its_results_has_a_category_of_its_own() -> None:
    model, prompts = freeze(GPT(config())), torch.zeros(B, T, dtype=torch.long)
    clean = inference_ledger(model, prompts, new_tokens=0)
    greedy = inference_ledger(model, prompts, new_tokens=0, memory=Greedy())
    held_before = greedy.peak_bytes - Greedy.taken
    assert 0.9 * clean.peak_bytes < held_before <= clean.peak_bytes
    results = greedy.categories["transients"] - (
        held_before - greedy.categories["weights"] - greedy.categories["batch"]
    )
    assert greedy.categories["kernel workspace"] == Greedy.taken - results


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shapes_without_data_hold_as_much(dtype: str) -> None:
    """On meta, where a plan counts; the CPU's allocator rounds each block up, a matter of a few per cent here."""
    c = config()
    with torch.device("meta"):
        model = GPT(c, dtype=DTYPES[dtype])
        tokens = torch.zeros(B, T, dtype=torch.long)
    optimizer = build(model, OptimConfig())
    with fused_attention():
        training_ledger(model, optimizer, tokens, tokens)  # Adam's state appears
        counted = training_ledger(model, optimizer, tokens, tokens).peaks
    expected = second_step(c, dtype=dtype).peaks
    for phase in ("forward", "loss", "backward"):  # there is no fused update on meta
        assert counted[phase] == pytest.approx(expected[phase], rel=0.03)
