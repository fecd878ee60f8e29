"""Families as Transformers writes them down: their config.json and the names of their tensors, both ways.

A family of its own needs a preset in base/architecture.py and an entry of FORMATS here.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from isoforward.base.architecture import FAMILIES
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import read_json
from isoforward.data.tokenizer import Tokenizer, one_or_all
from isoforward.formats.rope_format import rope_from_transformers, rope_to_transformers
from isoforward.formats.untrusted import Checkpoint, Stored, checked, open_tensors, shown
from isoforward.model.gpt import GPT

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # that old Transformers saved as if weights


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
    defaults: Mapping[str, object] = field(
        default_factory=lambda: LLAMA_DEFAULTS
    )  # Transformers' own, for keys that a file leaves out
    fixed: Mapping[str, tuple[object, ...]] = field(
        default_factory=lambda: SILU
    )  # what our forward does; the default first
    written: Mapping[str, object] = field(
        default_factory=lambda: {"hidden_act": "silu"}
    )  # what our forward does, where it must be said
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


def pieces(model: GPT) -> Iterator[tuple[str, list[Tensor]]]:
    """Every tensor of a checkpoint by name, as views of our parameters; the embedding comes first.

    Joined along their last dimension, the views are the tensor; filled from it, they load it. What GPT-2 always has
    and our model lacks (biases, a key and a value head for each query head) is zeros that nothing refers to, or the
    same view several times. A model that no class of Transformers computes keeps our own names.
    """
    config, family = model.config, written_as(model.config)
    if family is None:
        for name, parameter in model.named_parameters():
            yield name, [parameter]
        return
    form = FORMATS[family]
    for path, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None or (path == "unembedding" and config.tied):
            continue
        names = form.names.of(path)
        if form.conv1d and path not in ("embedding", "positions", "unembedding"):
            weight = weight.t()  # Conv1D keeps (in, out), a linear keeps (out, in); a norm has one dimension
            bias = weight.new_zeros(weight.shape[-1]) if bias is None else bias
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if form.conv1d and path.endswith("qkv"):
                yield f"{names[0]}.{kind}", a_head_each(config, tensor)
            else:
                rows = config.fused_rows[path.rpartition(".")[2]] if len(names) > 1 else [len(tensor)]
                for name, part in zip(names, tensor.split_with_sizes(rows), strict=True):
                    yield f"{name}.{kind}", [part]


def a_head_each(config: ModelConfig, qkv: Tensor) -> list[Tensor]:
    """Grouped keys and values, once for every query head that reads them."""
    q, k, v = qkv.split_with_sizes(config.qkv_widths, dim=-1)
    shared_by = config.heads // config.kv_head_count
    return [q] + [head for part in (k, v) for head in part.chunk(config.kv_head_count, -1) for _ in range(shared_by)]


def to_transformers(config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, object]:
    """config.json, in the spelling that Transformers 4 and 5 both read."""
    family = written_as(config)
    shared = {
        "model_type": family or "isoforward",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer and tokenizer.start,
        "eos_token_id": tokenizer and one_or_all(tokenizer.ends),
    }
    if family is None:
        return shared  # the rest is in manifest.json
    form = FORMATS[family]
    own = {"ffn": config.ffn_width, "head_dim": config.head_width, "kv_heads": config.kv_head_count}
    values = {theirs: own.get(ours, getattr(config, ours)) for ours, theirs in form.keys.items()}
    written = {"architectures": [form.architectures[0]], **shared, **values, **form.written}
    if form.conv1d:
        return written | dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.dropout)
    flags = next((flags for flags, bias in form.biases.items() if bias == config.architecture.bias), ())
    return written | dict(zip(form.bias_keys, flags, strict=True)) | rope_to_transformers(config)


def from_transformers(raw: Mapping[str, object], directory: Path = Path("DIRECTORY")) -> ModelConfig:
    """Reads the config.json of `directory`; BadInput names what our forward does not do."""
    family = raw.get("model_type")
    form = FORMATS.get(family) if isinstance(family, str) else None
    named = raw.get("architectures") or (form and [form.architectures[0]])
    if form is None or not isinstance(named, list) or not set(map(str, named)) <= set(form.architectures):
        refuse_contradictions(family, named)
        known = ", ".join(form.architectures[0] for form in FORMATS.values())
        as_it_is = f"isoforward phase_costs model=transformers model.path={shlex.quote(str(directory))}"
        raise BadInput(
            f"architecture {shown(named or family)} (model_type {shown(family)}) is not one we implement: {known} are; "
            f"to measure it as it is: {as_it_is}"
        )
    for key, allowed in form.fixed.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise BadInput(f"{key}={shown(raw[key])} is not what our {family} does, which is {shown(allowed[0])}")
    try:
        values = {
            ours: raw.get(theirs, form.defaults[ours]) if ours in form.defaults else raw[theirs]
            for ours, theirs in form.keys.items()
        }
        if not form.conv1d:
            values |= bias_of(raw, form) | rope_from_transformers(raw)
            refuse_short_windows(raw, str(family), values["context"])
        config = checked({"family": family} | values)
    except KeyError as error:
        raise BadInput(f"{error.args[0]} is missing") from error
    if config.head_dim is not None and config.head_dim * config.heads == config.width:
        return replace(config, head_dim=None)
    return config


def refuse_contradictions(family: object, named: object) -> None:
    """Where what the file names is implemented, but not as one."""
    types = {name: family for family, form in FORMATS.items() for name in form.architectures}
    meant = {types[name] for name in map(str, named) if name in types} if isinstance(named, list) else set()
    if family is None:
        way_out = f"; of {shown(named)} it is {meant.pop()!r}: write that into the file" if len(meant) == 1 else ""
        raise BadInput(f"model_type is missing{way_out}")
    if meant and str(family) not in meant:
        raise BadInput(
            f"model_type {shown(family)} and architectures {shown(named)} contradict each other; correct the wrong one"
        )


def bias_of(raw: Mapping[str, object], form: Format) -> dict[str, str]:
    if not form.biases:
        return {}
    flags = [raw.get(key, False) for key in form.bias_keys]
    bias = form.biases.get(tuple(flag for flag in flags if isinstance(flag, bool)))
    if bias is None:
        told = ", ".join(f"{key}={shown(flag)}" for key, flag in zip(form.bias_keys, flags, strict=True))
        raise BadInput(f"{told} is not what our forward does: the MLP has biases only where attention has them")
    return {"bias": bias}


def refuse_short_windows(raw: Mapping[str, object], family: str, context: object) -> None:
    """A sliding window as long as the context never cuts anything off, and only then is left out."""
    defaults: dict[str, int | None] = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}
    layers, window = raw.get("layer_types"), raw.get("sliding_window", defaults.get(family))
    if isinstance(layers, list):
        if odd := [kind for kind in layers if kind not in ("full_attention", "sliding_attention")]:
            raise BadInput(f"layer_types has {shown(odd[0])}, which our forward does not do")
        slides = "sliding_attention" in layers
    elif family == "mistral":
        slides = True
    else:
        slides = bool(raw.get("use_sliding_window", False))
    if not slides or window is None or not isinstance(context, int):
        return
    if type(window) is not int or window < context:
        raise BadInput(
            f"sliding_window={shown(window)} cuts attention off within the context of {context}, which our forward "
            "does not do; with max_position_embeddings no longer than the window it is the same model"
        )


def config_in(path: Path) -> ModelConfig:
    """Of a config.json, or of a directory that holds one: no weights are needed."""
    file = path if path.name == "config.json" else path / "config.json"
    if not file.is_file():
        raise BadInput(f"model.path={path} holds no config.json; name a directory of save_pretrained")
    try:
        return from_transformers(read_json(file), file.parent)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


def unwrapped(name: str) -> str:
    """Without what torch.compile and DistributedDataParallel put before the names of what they wrap."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def read_transformers(directory: Path, tensors: Mapping[str, Stored] | None = None) -> Checkpoint:
    """A directory as `save_pretrained` leaves it, today's or an earlier one's; its `tensors` where they are elsewhere.

    Masks that old versions saved are passed over, whatever their dtype, and so are heads beside the language model's.
    """
    tensors = open_tensors(directory) if tensors is None else tensors
    config = config_in(directory)
    form = FORMATS[config.family]
    outer = form.names.outer["embedding"], form.names.outer["norm"], form.names.layer
    prefix = outer[0].partition(".")[0] + "."  # which a model saved without its head leaves out
    own = {name.removeprefix(prefix).partition(".")[0] for name in (*outer, form.names.outer.get("positions", ""))}
    named, others = {}, []
    for stored, tensor in tensors.items():
        name = unwrapped(stored)
        if name.endswith(BUFFERS):
            continue
        if name.startswith((prefix, "lm_head.")):
            named[name] = tensor
        elif name.partition(".")[0] in own:
            named[prefix + name] = tensor
        else:
            others.append(name)
    if others:
        told = shown(others[0]) + (f" and {len(others) - 1} more" if others[1:] else "")
        warnings.warn(f"{directory}: passed over {told}, which the language model does not use", stacklevel=2)
    head = named.pop("lm_head.weight", None) if config.tied else None
    embedding = named.get(form.names.outer["embedding"] + ".weight")
    if head and embedding and (head.shape != embedding.shape or not torch.equal(head.read(), embedding.read())):
        raise Integrity(f"{head.file}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
    return Checkpoint(where=directory, config=config, tensors=named)
