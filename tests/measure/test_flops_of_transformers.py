"""FLOPs of Transformers' architectures: ours on meta, with the attention they come with; torch's, on eager attention.

Left out: mixtures of experts, whose grouped products torch's counter does not know, and convolutions, which we do not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from isoforward.measure.flops import FlopCounter, Scope, fused_attention

B, T = 2, 12
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "stablelm",
    "starcoder2",
    "olmo",
    "olmo2",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "granite",
    "helium",
    "smollm3",
    "gpt_bigcode",
    "biogpt",
    "xglm",
    "nemotron",
    "persimmon",
    "ernie4_5",
    "gpt_neo",
    "mpt",
    "openai-gpt",
    "bitnet",
    "arcee",
    "seed_oss",
    "exaone4",
    "apertus",
    "hunyuan_v1_dense",
    "ministral",
    "olmo3",
    "vaultgemma",
    "jais2",
    "nanochat",
    "gptj",
    "codegen",
    "falcon",
    "deepseek_v2",
]
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,  # no layer has experts
    "head_dim": 4,
}
OF_FAMILY: dict[str, dict[str, Any]] = {  # what these name otherwise, or have besides
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT | {"v_head_dim": 8},
}


def model_of(family: str, attention: str | None, **more: Any) -> Any:
    sizes = SIZES | OF_FAMILY.get(family, {}) | more
    if family == "falcon":  # it computes the width of a head
        del sizes["head_dim"]
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def ours(family: str, **more: Any) -> int:
    with torch.device("meta"):
        model, tokens = model_of(family, None, **more), torch.zeros(B, T, dtype=torch.long)
    counter = FlopCounter(Scope({}))
    with fused_attention(), counter:
        model(tokens, use_cache=False).logits.sum().backward()
    return counter.flops.total()


def torchs(family: str, **more: Any) -> int:
    model, tokens = model_of(family, "eager", **more), torch.zeros(B, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_counts_what_torchs_own_counter_does(family: str) -> None:
    assert ours(family) == torchs(family) > 0


def test_latent_attention_with_values_of_another_width_is_counted_by_hand() -> None:
    """DeepSeek V3's shape, dense layers: case 19 of what people bring."""
    H, C, wide, value = 4, 32, 12, 6
    maps = C * 16 + 16 * H * wide + C * (8 + 4) + 8 * H * (8 + value) + H * value * C + 3 * C * 64
    forward = 2 * B * T * (2 * maps + C * 96) + 2 * 2 * B * H * T * T * (wide + value)
    assert ours("deepseek_v3", **LATENT) == torchs("deepseek_v3", **LATENT) == 3 * forward
