"""Families as Transformers writes them down: keys of their config.json, and names of their tensors, as data.

A family of its own needs a preset in base/architecture.py and an entry of FORMATS here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isoforward.base.architecture import FAMILIES
from isoforward.base.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Names:
    """Of tensors, by our modules; several where we keep as one matrix what is stored as several."""

    outer: Mapping[str, str]
    layer: str
    inner: Mapping[str, str]

    def of(self, module: str) -> list[str]:
        """model.layers.7.self_attn.q_proj and its like, of blocks.7.attention.qkv"""
        if not module.startswith("blocks."):
            return [self.outer[module]]
        _, number, part = module.split(".", 2)
        return [self.layer.format(number) + name for name in self.inner[part].split()]


GPT2_NAMES = Names(
    outer={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "unembedding": "lm_head",
    },
    layer="transformer.h.{}.",
    inner={
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
)
LLAMA_NAMES = Names(
    outer={"embedding": "model.embed_tokens", "norm": "model.norm", "unembedding": "lm_head"},
    layer="model.layers.{}.",
    inner={
        "attention_norm": "input_layernorm",
        "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate_up": "mlp.gate_proj mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
)
QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
POST_NORMS = {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}

GPT2_KEYS = {
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
    "ffn": "n_inner",
    "context": "n_positions",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
    "dropout": "resid_pdrop",
    "norm_eps": "layer_norm_epsilon",
}
LLAMA_KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "width": "hidden_size",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "context": "max_position_embeddings",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
    "dropout": "attention_dropout",
    "norm_eps": "rms_norm_eps",
}


NOT_QUANTIZED: dict[str, tuple[object, ...]] = {"quantization_config": (None,)}
SILU: dict[str, tuple[object, ...]] = NOT_QUANTIZED | {"hidden_act": ("silu", "swish")}
LLAMA_DEFAULTS = {"kv_heads": None, "head_dim": None, "tied": False, "dropout": 0.0, "norm_eps": 1e-6}
ATTENTION_BIAS: dict[tuple[bool, ...], str] = {(False,): "none", (True,): "attention"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """How Transformers writes one family down: as Llama, but for what is given."""

    architectures: tuple[str, ...]  # classes with the same forward; the first is written
    names: Names = LLAMA_NAMES
    keys: Mapping[str, str] = field(default_factory=lambda: LLAMA_KEYS)  # of config.json, by ours
    defaults: Mapping[str, object] = field(default_factory=lambda: LLAMA_DEFAULTS)  # theirs, of keys that are left out
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: SILU)  # what we do; the default first
    written: Mapping[str, object] = field(default_factory=lambda: {"hidden_act": "silu"})  # where it must be said
    biases: Mapping[tuple[bool, ...], str] = field(default_factory=dict)  # by the values of bias_keys
    bias_keys: tuple[str, ...] = ()
    conv1d: bool = False  # GPT-2: blocks have matrices as (in, out), biases everywhere, a key head for each query head


def classes(name: str) -> tuple[str, ...]:
    return f"{name}ForCausalLM", f"{name}Model"


FORMATS = {
    "gpt2": Format(
        architectures=("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel"),
        names=GPT2_NAMES,
        keys=GPT2_KEYS,
        defaults={"ffn": None, "tied": True, "dropout": 0.1, "norm_eps": 1e-5},
        fixed=NOT_QUANTIZED
        | {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        written={"activation_function": "gelu_new"},
        conv1d=True,
    ),
    "llama": Format(
        architectures=classes("Llama"),
        bias_keys=("attention_bias", "mlp_bias"),
        biases={(False, False): "none", (True, False): "attention", (True, True): "all"},
    ),
    "mistral": Format(
        architectures=classes("Mistral"),
        defaults=LLAMA_DEFAULTS | {"kv_heads": 8},
        written={"hidden_act": "silu", "sliding_window": None},
    ),
    "qwen2": Format(
        architectures=classes("Qwen2"),
        defaults=LLAMA_DEFAULTS | {"kv_heads": 32},
        written={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": Format(
        architectures=classes("Qwen3"),
        names=replace(LLAMA_NAMES, inner={**LLAMA_NAMES.inner, **QK_NORMS}),
        defaults=LLAMA_DEFAULTS | {"kv_heads": 32, "head_dim": 128},
        written={"hidden_act": "silu", "use_sliding_window": False},
        bias_keys=("attention_bias",),
        biases=ATTENTION_BIAS,
    ),
    "olmo2": Format(
        architectures=classes("Olmo2"),
        names=replace(LLAMA_NAMES, inner={**LLAMA_NAMES.inner, **QK_NORMS, **POST_NORMS}),
        defaults=LLAMA_DEFAULTS | {"norm_eps": 1e-5},
        bias_keys=("attention_bias",),
        biases=ATTENTION_BIAS,
    ),
    "gemma": Format(
        architectures=classes("Gemma"),
        defaults=LLAMA_DEFAULTS | {"kv_heads": 16, "head_dim": 256, "tied": True},
        fixed=NOT_QUANTIZED
        | {
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # Gemma's gelu has always meant the tanh one
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": (None, False),
        },
        written={"hidden_act": "gelu_pytorch_tanh"},
        bias_keys=("attention_bias",),
        biases=ATTENTION_BIAS,
    ),
}


def written_as(config: ModelConfig) -> str | None:
    """The family whose class in Transformers computes what `config` says, its own before others; or none."""
    for family in dict.fromkeys((config.family, *FORMATS)):
        if family not in FORMATS:
            continue
        form, preset, own = FORMATS[family], FAMILIES[family], config.architecture
        biased = form.conv1d or own.bias in (form.biases.values() or (preset.bias,))
        heads = "head_dim" in form.keys or config.attention_width == config.width
        if biased and heads and replace(own, bias=preset.bias) == preset:
            return family
    return None
