"""Published figures, each with its source; then what torch and Transformers themselves count, save and hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.vocabulary import CONVENTIONS
from isoforward.measure.flops import count_training
from isoforward.model import cost, steps
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.loss import next_token_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gpt2(
    layers: int, width: int, *, heads: int = 1, vocab: int = 50257, context: int = 1024, **more: Any
) -> ModelConfig:
    return ModelConfig(layers=layers, width=width, heads=heads, vocab=vocab, context=context, **more)


def llama(layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        family="llama", layers=layers, width=width, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab, tied=False
    )


def conf(name: str) -> ModelConfig:
    """As conf/model/NAME.yaml has it."""
    values = OmegaConf.load(Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml")
    return ModelConfig(**{str(key): value for key, value in values.items() if key != "defaults"})


GPT2 = gpt2(12, 768, heads=12)
GPT2_WITHOUT_BIAS = gpt2(12, 768, heads=12, bias=False)
LLAMA2_7B = llama(32, 4096, 32, 32, 11008, 32000)
LLAMA2_70B = llama(80, 8192, 64, 8, 28672, 32000)
MPT_7B = gpt2(32, 4096, heads=32, vocab=50368, context=2048)  # with biases, as its published count has them

SMALL = {
    "gpt2": ModelConfig(layers=3, heads=4, width=32, context=24, vocab=40),
    "gpt2 untied, no bias, grouped": ModelConfig(
        layers=2, heads=4, kv_heads=2, width=32, context=24, vocab=40, ffn=72, tied=False, bias=False
    ),
    "llama": ModelConfig(family="llama", layers=2, heads=4, width=32, context=24, vocab=40, ffn=48, tied=False),
    "llama tied, grouped": ModelConfig(family="llama", layers=3, heads=4, kv_heads=1, width=32, context=24, vocab=40),
    "qwen2": ModelConfig(family="qwen2", layers=2, heads=4, kv_heads=2, width=32, context=24, vocab=40, ffn=48),
    "qwen3": ModelConfig(family="qwen3", layers=2, heads=4, kv_heads=2, width=32, head_dim=16, context=24, vocab=40),
    "mistral": ModelConfig(family="mistral", layers=2, heads=4, kv_heads=1, width=32, head_dim=12, vocab=40, ffn=40),
    "olmo2": ModelConfig(family="olmo2", layers=3, heads=4, kv_heads=2, width=32, vocab=40, ffn=48, tied=False),
    "gemma": ModelConfig(family="gemma", layers=2, heads=2, kv_heads=1, width=24, head_dim=32, vocab=40, ffn=56),
    "a mixture": ModelConfig(
        family="gpt2", mlp="geglu", qk_norm="head", norm_position="post", layers=2, heads=4, width=32, vocab=40
    ),
    "another": ModelConfig(
        family="gpt2", positions="rope", norm="rmsnorm", bias="attention", qk_norm="width", vocab=40
    ),
}
small = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Published: parameters


@pytest.mark.parametrize(
    ("source", "config", "expected"),
    [
        ("llm.c README", GPT2, 124439808),
        ("nanoGPT transformer_sizing.ipynb", GPT2_WITHOUT_BIAS, 124337664),
        ("Transformers, gpt2-medium", gpt2(24, 1024), 354823168),
        ("Transformers, gpt2-large", gpt2(36, 1280), 774030080),
        ("Transformers, gpt2-xl", gpt2(48, 1600), 1557611200),
        ("llm.c pull request 156", gpt2(6, 384, vocab=66, context=256), 10771200),
        ("calflops README, Llama-2-7B", LLAMA2_7B, 6738415616),
        ("model card, Llama-3.1-8B", llama(32, 4096, 32, 8, 14336, 128256), 8030261248),
        ("model card, Llama-3.1-70B", llama(80, 8192, 64, 8, 28672, 128256), 70553706496),
        ("model card, Llama-3.1-405B", llama(126, 16384, 128, 8, 53248, 128256), 405853388800),
        ("model card, Qwen2.5-0.5B: 0.49B", conf("qwen2_5_0_5b"), 494032768),
        ("safetensors index on the Hub, Qwen3-0.6B", conf("qwen3_0_6b"), 596049920),
        ("safetensors index on the Hub, Mistral-7B-v0.3", conf("mistral_7b"), 7248023552),
        ("safetensors index on the Hub, OLMo-2-1124-7B", conf("olmo2_7b"), 7298617344),
        ("safetensors index on the Hub, gemma-2b", conf("gemma_2b"), 2506172416),
        ("llm-foundry benchmarking README, 125m", gpt2(12, 768, vocab=50368, context=2048), 125311488),
        ("llm-foundry benchmarking README, 1b", gpt2(24, 2048, vocab=50368, context=2048), 1315950592),
        ("llm-foundry benchmarking README, 7b", MPT_7B, 6658859008),
        ("llm-foundry benchmarking README, 7b at 65536", gpt2(32, 4096, vocab=50368, context=65536), 6918905856),
        ("llm-foundry benchmarking README, 70b", gpt2(80, 8192, vocab=50368, context=2048), 64862437376),
    ],
)
def test_parameters_are_those_published(source: str, config: ModelConfig, expected: int) -> None:
    assert cost.parameters(config).total == expected


def test_a_layer_of_gpt2_without_biases_has_nanogpts_parameters() -> None:
    """nanoGPT transformer_sizing.ipynb, `block`."""
    assert cost.layer_parameters(GPT2_WITHOUT_BIAS) == 7079424


@pytest.mark.parametrize(
    ("layers", "width", "billions"), [(24, 2304, "1.7"), (36, 4096, "7.5"), (60, 10240, "76.1"), (128, 25600, "1008.0")]
)
def test_parameters_of_megatrons_models_are_those_of_its_table_1(layers: int, width: int, billions: str) -> None:
    """Narayanan 2021, table 1."""
    assert f"{cost.parameters(gpt2(layers, width, vocab=51200, context=2048)).total / 1e9:.1f}" == billions


def test_non_embedding_parameters_are_twelve_layers_of_squared_width() -> None:
    """Kaplan 2020, section 2.1: 12 L C^2 where biases and norms are left out."""
    blocks = cost.non_embedding_parameters(GPT2_WITHOUT_BIAS)
    assert blocks - (2 * 12 + 1) * 768 == 12 * 12 * 768**2
    assert cost.matmul_weights(GPT2) == 12 * 12 * 768**2 + 50257 * 768


# Published: FLOPs


def test_forward_and_backward_of_gpt2_are_nanogpts() -> None:
    """nanoGPT transformer_sizing.ipynb: forward_total, total."""
    forward = cost.forward_flops(GPT2_WITHOUT_BIAS, batch=1, length=1024, convention="model")
    backward = cost.backward_flops(GPT2_WITHOUT_BIAS, batch=1, length=1024, convention="model")
    assert forward.total == 291648307200
    assert (forward + backward).total == 874944921600
    assert forward["projections"] == 12 * (3623878656 + 1207959552)
    assert forward["scores"] == 12 * 2 * 1610612736
    assert forward["mlp"] == 12 * 9663676416
    assert forward["head"] == 79047426048


def test_forward_of_llama2_7b_is_calflops() -> None:
    """calflops README: 850.00 GMACs, and 1700.06 GFLOPs with one for each SiLU and softmax element."""
    flops = cost.forward_flops(LLAMA2_7B, batch=1, length=128).total
    assert flops / 2 == pytest.approx(850.00e9, rel=1e-5)
    silu, softmax = 32 * 128 * 11008, 32 * 32 * 128**2
    assert flops + silu + softmax == pytest.approx(1700.06e9, rel=1e-5)


MEGATRON = gpt2(96, 12288, heads=96, vocab=51200, context=2048)
B, s, h, layers, V = 4, 2048, 12288, 96, 51200


def test_full_recomputation_is_narayanans_equation_3() -> None:
    """Narayanan 2021, eq. 3: 96 B s l h^2 (1 + s/6h + V/16lh)."""
    forward = cost.forward_flops(MEGATRON, batch=B, length=s)
    backward = cost.backward_flops(
        MEGATRON, batch=B, length=s, convention="hardware", kernel="math", checkpointing="full", early_stop=False
    )
    assert (forward + backward).total == 96 * B * s * layers * h**2 + 16 * B * s**2 * layers * h + 6 * B * s * h * V


def test_model_flops_are_korthikantis_equation_7() -> None:
    """Korthikanti 2022, eq. 7: 72 B L s h^2 (1 + s/6h + v/12hL)."""
    step = cost.forward_flops(MEGATRON, batch=B, length=s) + cost.backward_flops(MEGATRON, batch=B, length=s)
    assert step.total == 72 * B * layers * s * h**2 + 12 * B * layers * s**2 * h + 6 * B * s * h * V


def test_selective_recomputation_is_korthikantis_equation_8_by_its_text() -> None:
    """Korthikanti 2022: one more forward of attention is 2s/9h, where the equation prints s/3h."""
    rest = 72 * B * layers * s * h**2 + 6 * B * s * h * V
    forward = cost.forward_flops(MEGATRON, batch=B, length=s)
    backward = cost.backward_flops(
        MEGATRON, batch=B, length=s, convention="hardware", kernel="math", checkpointing="selective"
    )
    assert (forward + backward).total == rest + 16 * B * layers * s**2 * h


@pytest.mark.parametrize(
    ("layers", "width", "mfu", "hfu"),
    [(48, 6144, 41.5, 43.7), (96, 12288, 51.4, 52.8), (105, 20480, 56.0, 57.0), (128, 25600, 56.3, 57.0)],
)
def test_published_hardware_utilisation_follows_equation_8_as_printed(
    layers: int, width: int, mfu: float, hfu: float
) -> None:
    """Korthikanti 2022, table 5: 22B, 175B, 530B and 1T; each utilisation is printed to 0.1."""
    config = gpt2(layers, width, vocab=51200, context=2048)
    forward = cost.forward_flops(config, batch=1, length=2048)
    step = forward + cost.backward_flops(config, batch=1, length=2048)
    ratio = (step.total + 3 * forward["scores"]) / step.total  # s/3h is three more forwards of attention
    assert (mfu - 0.05) * ratio - 0.05 <= hfu <= (mfu + 0.05) * ratio + 0.05


@pytest.mark.parametrize(("width", "tokens", "overhead"), [(768, 524288, "0.7%"), (16384, 16_000_000, "0.5%")])
def test_newton_schulz_adds_what_muons_author_says(width: int, tokens: int, overhead: str) -> None:
    """Jordan 2024, "Muon", runtime analysis: Tm/B of a square matrix's 6 m^2 B; NanoGPT speedrun and Llama 405B."""
    assert f"{cost.newton_schulz_flops(width, width) / (6 * width**2 * tokens):.1%}" == overhead


def test_an_adam_step_moves_seven_numbers_a_parameter() -> None:
    """By hand: weight, gradient, two moments in; weight, two moments out."""
    assert cost.optimizer_bytes(GPT2, optimizer="adamw") == 28 * 124439808
    assert cost.optimizer_bytes(GPT2, optimizer="sgd") == 12 * 124439808


# Counted by torch


def counted(model: nn.Module, tokens: Tensor) -> tuple[int, int]:
    """Of forward and of backward; attention taken apart into products, since torch counts its CPU kernel as nothing."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(tokens)
        with FlopCounterMode(display=False) as backward:
            next_token_loss(getattr(logits, "logits", logits), tokens).backward()  # type: ignore[no-untyped-call]
    return forward.get_total_flops(), backward.get_total_flops()


@small
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = GPT(config)
    assert cost.parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert cost.layer_parameters(config) == block


@small
@pytest.mark.parametrize("checkpointing", cost.CHECKPOINTING)
def test_flops_are_those_that_torch_counts(config: ModelConfig, checkpointing: str) -> None:
    with torch.device("meta"):
        model, tokens = GPT(config, checkpointing=checkpointing), torch.zeros(3, 10, dtype=torch.long)
    forward = cost.forward_flops(config, batch=3, length=10, convention="hardware")
    backward = cost.backward_flops(
        config, batch=3, length=10, convention="hardware", kernel="math", checkpointing=checkpointing
    )
    assert (forward.total, backward.total) == counted(model, tokens)


@small
def test_flops_of_prefill_and_decode_are_those_that_torch_counts(config: ModelConfig) -> None:
    with torch.device("meta"):
        model, prompt = GPT(config), torch.zeros(3, 10, dtype=torch.long)
        cache = KVCache(config, batch=3, capacity=11, dtype=model.dtype, device="meta")
    with FlopCounterMode(display=False) as prefill:
        steps.prefill(model, prompt, cache)
    with FlopCounterMode(display=False) as decode:
        steps.decode(model, prompt[:, :1], cache)
    with FlopCounterMode(display=False) as uncached:
        steps.decode_uncached(model, torch.cat((prompt, prompt[:, :1]), dim=1))
    assert cost.forward_flops(config, batch=3, length=10, logits="last").total == prefill.get_total_flops()
    assert cost.decode_flops(config, batch=3, cached=10).total == decode.get_total_flops()
    assert cost.decode_flops(config, batch=3, cached=10, cache=False).total == uncached.get_total_flops()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers_own_models_have_these_parameters_and_flops(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        config = SMALL["gpt2"]
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        theirs = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=24, **drops, **shape)
        model = transformers.GPT2LMHeadModel(theirs)
    else:
        config = ModelConfig(
            family="llama", layers=2, heads=4, kv_heads=2, width=32, context=24, vocab=40, ffn=48, tied=False
        )
        theirs = transformers.LlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=32,
            intermediate_size=48,
            **shape,
        )
        model = transformers.LlamaForCausalLM(theirs)
    assert cost.parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
    ours = (cost.forward_flops(config, batch=2, length=12).total, cost.backward_flops(config, batch=2, length=12).total)
    assert ours == counted(model, torch.zeros(2, 12, dtype=torch.long))


@small
def test_muons_products_are_those_that_torch_counts_in_its_own_muon_on_every_map_apart(config: ModelConfig) -> None:
    fused = {"attention.qkv.weight": config.qkv_widths}
    fused["mlp.gate_up.weight"] = [config.ffn_width] * 2
    matrices = [
        part.detach().clone().requires_grad_()
        for name, parameter in GPT(config).blocks.named_parameters()
        if parameter.dim() == 2
        for part in parameter.split(fused.get(name.partition(".")[2], parameter.shape[0]))
    ]
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    with FlopCounterMode(display=False) as step:
        torch.optim.Muon(matrices).step()  # type: ignore[no-untyped-call]
    flops = cost.optimizer_flops(config, optimizer="muon")
    assert flops["products"] == step.get_total_flops()
    others = cost.parameters(config).total - sum(matrix.numel() for matrix in matrices)
    assert flops["elementwise"] == 10 * (cost.parameters(config).total - others) + 14 * others


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_full_checkpointing_recomputes_is_what_torch_dispatches(dropout: float) -> None:
    config = dataclasses.replace(SMALL["gpt2"], dropout=dropout)
    counted = count_training(config, batch=2, length=8, checkpointing="full", convention="hardware")
    flops = cost.backward_flops(config, batch=2, length=8, checkpointing="full", convention="hardware")
    assert flops.total == counted["backward"]


def test_hardware_adds_a_product_for_flash_and_the_recomputed_blocks_less_their_last_product() -> None:
    """By hand, C=32, F=128, L=3, B=1, T=8; selective checkpointing keeps what flash attention gives."""
    model = cost.backward_flops(SMALL["gpt2"], batch=1, length=8)
    flash = cost.backward_flops(SMALL["gpt2"], batch=1, length=8, convention="hardware")
    again = cost.backward_flops(SMALL["gpt2"], batch=1, length=8, convention="hardware", checkpointing="full")
    selective = cost.backward_flops(SMALL["gpt2"], batch=1, length=8, convention="hardware", checkpointing="selective")
    one_product = 3 * 2 * 8 * 8 * 32
    assert selective.total == flash.total
    assert flash.total - model.total == one_product
    assert again.total - flash.total == 3 * 8 * 2 * (4 * 32**2 + 128 * 32) + 2 * one_product


# Properties

configs = st.sampled_from(list(SMALL.values()))
conventions = st.sampled_from(CONVENTIONS)


@given(configs, st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), conventions, st.booleans())
@settings(max_examples=60, deadline=None)
def test_generation_in_closed_form_is_prefill_and_each_decode_step(
    config: ModelConfig, batch: int, prompt: int, new: int, convention: str, cache: bool
) -> None:
    total = cost.forward_flops(config, batch=batch, length=prompt, logits="last", convention=convention)
    for cached in range(prompt, prompt + new - 1):
        total += cost.decode_flops(config, batch=batch, cached=cached, cache=cache, convention=convention)
    assert total == cost.generation_flops(
        config, batch=batch, prompt=prompt, new=new, cache=cache, convention=convention
    )


@given(configs, st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_causally_counted_decoding_costs_exactly_the_forward_over_the_same_tokens(
    config: ModelConfig, length: int
) -> None:
    decoded = sum(cost.decode_flops(config, batch=1, cached=n, convention="causal").total for n in range(length))
    assert decoded == cost.forward_flops(config, batch=1, length=length, convention="causal").total


@given(configs, st.integers(1, 8), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_causal_is_below_model_is_below_hardware_and_no_part_is_negative(
    config: ModelConfig, batch: int, length: int
) -> None:
    causal, model, hardware = (
        cost.backward_flops(config, batch=batch, length=length, convention=convention, checkpointing="full")
        for convention in ("causal", "model", "hardware")
    )
    assert causal.total <= model.total < hardware.total
    assert min(min(parts.values()) for parts in (causal, model, hardware)) >= 0
    assert all(isinstance(amount, int) for amount in hardware.values())


# Bad input


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"convention": "causale"}, "convention=causale.*did you mean causal"),
        ({"length": 0}, "length=0"),
        ({"batch": -1}, "batch=-1"),
        ({"cached": -1}, "cached=-1"),
        ({"logits": "first"}, "logits=first"),
    ],
)
def test_bad_input_is_named(override: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        cost.forward_flops(GPT2, **{"batch": 1, "length": 8, **override})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BadInput, match="optimizer=lion"):
        cost.optimizer_flops(GPT2, optimizer="lion")
    with pytest.raises(BadInput, match=r"model\.vocab"):
        cost.parameters(ModelConfig())
