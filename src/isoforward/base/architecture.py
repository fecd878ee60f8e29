"""What tells one family of decoder-only models from another, as data; a family is a preset of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isoforward.base.errors import BadInput

BIASED = {  # the parts that add a bias to what they compute
    "none": (),
    "qkv": ("qkv",),
    "attention": ("qkv", "out"),
    "all": ("qkv", "out", "mlp", "norm"),
}
CHOICES = {
    "norm": ("layernorm", "rmsnorm", "rmsnorm_1p"),
    "norm_position": ("pre", "post"),
    "mlp": ("gelu", "swiglu", "geglu"),
    "positions": ("learned", "rope"),
    "qk_norm": ("none", "head", "width"),
    "bias": tuple(BIASED),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    norm: str = "rmsnorm"  # rmsnorm_1p multiplies by 1 + weight (Gemma; Megatron's layernorm_1p)
    norm_position: str = "pre"  # of what a sublayer reads; post: of what it adds to the residual stream (OLMo 2)
    mlp: str = "swiglu"
    positions: str = "rope"
    qk_norm: str = "none"  # of queries and keys: each head on its own (Qwen3), or all heads together (OLMo 2)
    bias: str = "none"
    scaled_embedding: bool = False  # token embeddings times sqrt(width)

    @property
    def gated(self) -> bool:
        return self.mlp != "gelu"

    @property
    def rope(self) -> bool:
        return self.positions == "rope"

    def biased(self, part: str) -> bool:
        """Whether `part` (qkv, out, mlp or norm) has biases; an RMSNorm never has."""
        return part in BIASED[self.bias] and not (part == "norm" and self.norm != "layernorm")


FAMILIES = {
    "gpt2": Architecture(norm="layernorm", mlp="gelu", positions="learned", bias="all"),
    "llama": Architecture(),
    "mistral": Architecture(),
    "smollm": Architecture(),
    "qwen2": Architecture(bias="qkv"),
    "qwen3": Architecture(qk_norm="head"),
    "olmo2": Architecture(norm_position="post", qk_norm="width"),
    "gemma": Architecture(norm="rmsnorm_1p", mlp="geglu", scaled_embedding=True),
}

ROPE_SCALING = {  # by type: what must be given, what may be
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_context"), ()),
    "yarn": (
        ("factor", "original_context"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


THEIRS = {"rope_type": "type", "original_max_position_embeddings": "original_context"}  # in files of Transformers


def checked_rope_scaling(scaling: object) -> Mapping[str, Any] | None:
    """With our names in place of Transformers'. `type` is llama3 where it is left out, as before there were others."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise BadInput(f"model.rope_scaling={str(scaling)[:40]} is no table; write {{type: linear, factor: 2.0}}")
    for theirs, ours in THEIRS.items():
        if theirs in scaling and scaling.get(ours, scaling[theirs]) != scaling[theirs]:
            raise BadInput(f"model.rope_scaling: {theirs} and {ours} are the same setting and differ; leave one out")
    scaling = {THEIRS.get(str(key), str(key)): value for key, value in scaling.items()}
    kind = scaling.get("type", "llama3")
    if not isinstance(kind, str) or kind not in ROPE_SCALING:
        raise BadInput(f"model.rope_scaling.type={str(kind)[:40]} is not one of {', '.join(ROPE_SCALING)}")
    needed, optional = ROPE_SCALING[kind]
    if missing := [key for key in needed if scaling.get(key) is None]:
        raise BadInput(f"model.rope_scaling of type {kind} needs {', '.join(missing)}")
    for key, value in scaling.items():
        if key == "type":
            continue
        if key not in (*needed, *optional):
            raise BadInput(f"model.rope_scaling.{str(key)[:40]} is no setting of type {kind}")
        number = type(value) in (int, float) and 0 < value < 2**63
        if not (type(value) is bool if key == "truncate" else number):
            raise BadInput(f"model.rope_scaling.{key}={str(value)[:40]} is not of the right kind")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise BadInput("model.rope_scaling: low_freq_factor must be below high_freq_factor")
    return scaling
