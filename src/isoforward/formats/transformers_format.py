"""GPT-2 and Llama as Transformers writes them down: their config.json and the names of their tensors, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.data.tokenizer import Tokenizer, one_or_all
from isoforward.formats.untrusted import Checkpoint, checked, open_tensors, read_json, shown
from isoforward.model.gpt import GPT

FIXED: dict[str, dict[str, tuple[object, ...]]] = {  # what our forward does, and Transformers' default first
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    "llama": {"hidden_act": ("silu", "swish"), "quantization_config": (None,)},
}
ARCHITECTURES = {"gpt2": ["GPT2LMHeadModel"], "llama": ["LlamaForCausalLM"]}
ROPE_SCALING = {  # of Llama 3: ours, theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
HEADLESS = {"gpt2": "transformer.", "llama": "model."}  # what a model saved without its head leaves out of its names
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # that old Transformers saved as if weights


def pieces(model: GPT) -> Iterator[tuple[str, list[Tensor]]]:
    """Every tensor of a Transformers checkpoint by name, as views of our parameters.

    Joined along their last dimension, the views are the tensor; filled from it, they load it. What GPT-2 always has
    and our model lacks (biases, a key and a value head for each query head) is zeros that nothing refers to, or the
    same view several times.
    """
    yield from gpt2_pieces(model) if model.config.family == "gpt2" else llama_pieces(model)
    if not model.config.tied:
        yield "lm_head.weight", [model.unembedding.weight]


def gpt2_pieces(model: GPT) -> Iterator[tuple[str, list[Tensor]]]:
    config = model.config
    shared_by = config.heads // config.kv_head_count

    def a_head_each(qkv: Tensor) -> list[Tensor]:
        q, k, v = qkv.split_with_sizes([config.width, config.kv_width, config.kv_width], dim=-1)
        return [q] + [
            head for part in (k, v) for head in part.chunk(config.kv_head_count, -1) for _ in range(shared_by)
        ]

    blocks: Any = model.blocks
    parts: list[tuple[str, Any]] = [("ln_f", model.norm)]
    for layer, block in enumerate(blocks):
        parts += [
            (f"h.{layer}.ln_1", block.attention_norm),
            (f"h.{layer}.attn.c_attn", block.attention.qkv),
            (f"h.{layer}.attn.c_proj", block.attention.out),
            (f"h.{layer}.ln_2", block.mlp_norm),
            (f"h.{layer}.mlp.c_fc", block.mlp.up),
            (f"h.{layer}.mlp.c_proj", block.mlp.down),
        ]
    assert model.positions is not None
    yield "transformer.wte.weight", [model.embedding.weight]
    yield "transformer.wpe.weight", [model.positions.weight]
    for name, part in parts:
        weight = part.weight.t()  # GPT-2's Conv1D keeps (in, out), a linear keeps (out, in); a norm has one dimension
        bias = weight.new_zeros(weight.shape[-1]) if part.bias is None else part.bias
        for kind, tensor in (("weight", weight), ("bias", bias)):
            yield f"transformer.{name}.{kind}", a_head_each(tensor) if name.endswith("c_attn") else [tensor]


def llama_pieces(model: GPT) -> Iterator[tuple[str, list[Tensor]]]:
    yield "model.embed_tokens.weight", [model.embedding.weight]
    yield "model.norm.weight", [model.norm.weight]  # type: ignore[list-item]
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", [block.attention_norm.weight]
        yield f"{at}.post_attention_layernorm.weight", [block.mlp_norm.weight]
        for kind in ("weight", "bias") if model.config.has_bias else ("weight",):
            q, k, v = getattr(block.attention.qkv, kind).split(block.attention.widths)
            gate, up = getattr(block.mlp.gate_up, kind).chunk(2)
            yield f"{at}.self_attn.q_proj.{kind}", [q]
            yield f"{at}.self_attn.k_proj.{kind}", [k]
            yield f"{at}.self_attn.v_proj.{kind}", [v]
            yield f"{at}.self_attn.o_proj.{kind}", [getattr(block.attention.out, kind)]
            yield f"{at}.mlp.gate_proj.{kind}", [gate]
            yield f"{at}.mlp.up_proj.{kind}", [up]
            yield f"{at}.mlp.down_proj.{kind}", [getattr(block.mlp.down, kind)]


def to_transformers(config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json, in the spelling that Transformers 4 and 5 both read."""
    shared = {
        "architectures": ARCHITECTURES[config.family],
        "model_type": config.family,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer and tokenizer.start,
        "eos_token_id": tokenizer and one_or_all(tokenizer.ends),
    }
    if config.family == "gpt2":
        return shared | {
            "n_positions": config.context,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.ffn_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        }
    scaling: dict[str, Any] | None = None
    if config.rope_scaling:
        scaling = {theirs: config.rope_scaling[ours] for ours, theirs in ROPE_SCALING.items()}
        scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
        scaling["rope_type"] = "llama3"
    return shared | {
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_head_count,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": config.has_bias,
        "mlp_bias": config.has_bias,
        "attention_dropout": config.dropout,
    }


def from_transformers(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json; BadInput names what our forward does not do."""
    family = raw.get("model_type")
    architectures = raw.get("architectures") or ARCHITECTURES.get(str(family))
    if not isinstance(family, str) or family not in FIXED or architectures != ARCHITECTURES[family]:
        raise BadInput(
            f"architecture {shown(architectures or family)} (model_type {shown(family)}) is not one we implement: "
            "GPT2LMHeadModel and LlamaForCausalLM are; write model=transformers to measure any other as it is"
        )
    for key, allowed in FIXED[family].items():
        if raw.get(key, allowed[0]) not in allowed:
            raise BadInput(f"{key}={shown(raw[key])} is not what our {family} does, which is {shown(allowed[0])}")
    try:
        config = checked({"family": family} | (gpt2_values(raw) if family == "gpt2" else llama_values(raw)))
    except KeyError as error:
        raise BadInput(f"{error.args[0]} is missing") from error
    if raw.get("head_dim") not in (None, config.head_width):
        raise BadInput(f"head_dim={shown(raw['head_dim'])} is not hidden_size / num_attention_heads, as in our Llama")
    return config


def gpt2_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layers": raw["n_layer"],
        "heads": raw["n_head"],
        "width": raw["n_embd"],
        "ffn": raw.get("n_inner"),
        "context": raw["n_positions"],
        "vocab": raw["vocab_size"],
        "tied": raw.get("tie_word_embeddings", True),
        "dropout": raw.get("resid_pdrop", 0.1),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
    }


def llama_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    theta, scaling = rotary_values(raw)
    if raw.get("mlp_bias", False) != raw.get("attention_bias", False):
        raise BadInput("attention_bias and mlp_bias differ; our Llama has biases everywhere or nowhere")
    return {
        "layers": raw["num_hidden_layers"],
        "heads": raw["num_attention_heads"],
        "kv_heads": raw.get("num_key_value_heads"),
        "width": raw["hidden_size"],
        "ffn": raw["intermediate_size"],
        "context": raw["max_position_embeddings"],
        "vocab": raw["vocab_size"],
        "tied": raw.get("tie_word_embeddings", False),
        "bias": raw.get("attention_bias", False),
        "dropout": raw.get("attention_dropout", 0.0),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def rotary_values(raw: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Theta and scaling, in the spelling of Transformers 4 (rope_theta, rope_scaling) or of 5 (rope_parameters)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"rope_scaling={shown(rope)} is not a table of settings")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or partial not in (1, None):
        raise BadInput(
            f"rope_type {shown(kind)} (partial_rotary_factor {shown(partial)}) is not one we implement: "
            "default and llama3, on whole heads, are"
        )
    return theta, {ours: rope[theirs] for ours, theirs in ROPE_SCALING.items()} if kind == "llama3" else None


def read_transformers(directory: Path) -> Checkpoint:
    """A directory as `save_pretrained` leaves it, today's or an earlier one's."""
    tensors = open_tensors(directory)
    try:
        config = from_transformers(read_json(directory / "config.json"))
    except BadInput as error:
        raise BadInput(f"{directory / 'config.json'}: {error}") from error
    prefix = HEADLESS[config.family]
    named = {
        name if name.startswith((prefix, "lm_head.")) else prefix + name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(BUFFERS)
    }
    head = named.pop("lm_head.weight", None) if config.tied else None
    embedding = named.get(f"{prefix}wte.weight", named.get(f"{prefix}embed_tokens.weight"))
    if head and embedding and (head.shape != embedding.shape or not torch.equal(head.read(), embedding.read())):
        raise Integrity(f"{directory}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
    return Checkpoint(where=directory, config=config, tensors=named)
