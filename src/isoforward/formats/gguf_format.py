"""Weights as llama.cpp keeps them: one GGUF file, often in quantized blocks, a Llama's queries and keys reordered.

Architectures are those of FAMILIES, and a tensor's name is looked up in our own names, by way of Names.

The header is read here and not with the package `gguf`, whose reader believes every count in it and can be made to
loop for ever; that package turns blocks into numbers.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from isoforward.base.architecture import FAMILIES
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.families import FORMATS, Names, written_as
from isoforward.formats.transformers_tokenizer import read_foreign_tokenizer
from isoforward.formats.untrusted import Checkpoint, Stored, checked, shown

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
COUNT_LIMIT, STRING_LIMIT = 2**16, 2**22  # far above any real file's
BASIC = Names(
    outer={
        "embedding": "token_embd",
        "positions": "position_embd",
        "norm": "output_norm",
        "unembedding": "output",
    },
    layer="blk.{}.",
    inner={
        "attention_norm": "attn_norm",
        "attention.qkv": "attn_q attn_k attn_v",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "attention.out": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.gate_up": "ffn_gate ffn_up",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
    },
)
GGUF_NAMES = {  # by llama.cpp's architecture, which has the name of our family; Mistral and SmolLM are its llama
    "llama": BASIC,
    "qwen2": BASIC,
    "qwen3": BASIC,
    "gemma": BASIC,
    "olmo2": replace(
        BASIC, inner={**BASIC.inner, "attention_norm": "post_attention_norm", "mlp_norm": "post_ffw_norm"}
    ),
    "gpt2": replace(BASIC, inner={**BASIC.inner, "attention.qkv": "attn_qkv"}),
}
MUST_BE = {  # settings that change what is computed, and what our forward does
    "expert_count": (None, 0),
    "attention.scale": (None, 0.0),
    "attention.max_alibi_bias": (None, 0.0),
    "attention.clamp_kqv": (None, 0.0),
    "attention.causal": (None, True),
    "attn_logit_softcapping": (None, 0.0),
    "final_logit_softcapping": (None, 0.0),
    "logit_scale": (None, 0.0, 1.0),
    "residual_scale": (None, 0.0, 1.0),
    "embedding_scale": (None, 0.0, 1.0),
    "use_parallel_residual": (None, False),
}


class Header:
    """What stands before the numbers: settings (arrays are passed over), and where each tensor lies."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        if file.read(4) != b"GGUF" or self.number("I") not in (2, 3):
            raise ValueError("no GGUF of version 2 or 3")
        tensors, settings = self.count(), self.count()
        self.settings = dict(self.setting() for _ in range(settings))
        self.tensors = dict(self.tensor() for _ in range(tensors))
        alignment = self.settings.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= STRING_LIMIT:
            raise ValueError("an impossible alignment")
        self.data_start = -(-file.tell() // alignment) * alignment

    def number(self, code: str) -> Any:
        length = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self.file.read(length))[0]

    def count(self) -> int:
        value: int = self.number("Q")
        if value > COUNT_LIMIT:
            raise ValueError(f"{value} entries")
        return value

    def string(self) -> str:
        length = self.number("Q")
        if length > STRING_LIMIT:
            raise ValueError(f"a string of {length} bytes")
        return self.file.read(length).decode()  # cut short, it cannot be followed by what must follow

    def setting(self) -> tuple[str, object]:
        return self.string(), self.value(self.number("I"))

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind in SCALARS:
            self.skip(length * struct.calcsize(f"<{SCALARS[kind]}"))
        elif kind == STRING:
            for _ in range(length):  # no longer than the file: each has eight bytes
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"an array of kind {kind}")
        return None

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("an array that ends beyond the file")
        self.file.seek(count, os.SEEK_CUR)

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """Name; shape in the order of torch, kind of block, offset."""
        name = self.string()
        dimensions = self.number("I")
        if dimensions > 4:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, (shape, self.number("I"), self.number("Q"))


def read_gguf(path: Path) -> Checkpoint:
    """Raises Integrity where the file is broken, BadInput where it is no Llama that our forward computes."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise BadInput(f"{path} needs the package gguf: pip install isoforward[hf]") from error
    header, size = read_header(path)
    config = config_of(header, path)
    places = transformers_names(config, str(header.settings["general.architecture"]))

    def read(kind: object, start: int, shape: tuple[int, ...], place: Place) -> Tensor:
        blocks = np.array(np.memmap(path, np.uint8, mode="r", offset=start, shape=shape))
        numbers = torch.from_numpy(dequantize(blocks, kind))
        if place.heads is not None:
            numbers = features_in_halves(numbers, place.heads)
        return numbers.T.contiguous() if place.transposed else numbers - place.shift

    tensors = {}
    for name, (shape, number, offset) in header.tensors.items():
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, NotImplementedError) as error:
            raise BadInput(f"{path}: {shown(name)} is in blocks that the package gguf cannot read") from error
        start = header.data_start + offset
        if not shape or shape[-1] % block or start + math.prod(shape) // block * block_bytes > size:
            raise Integrity(f"{path}: {shown(name)} of shape {shape} does not lie in the file")
        if name not in places:
            raise BadInput(f"{path}: the tensor {shown(name)} has no place in our {config.family}")
        place, blocks = places[name], (*shape[:-1], shape[-1] // block * block_bytes)
        tensors[place.name] = Stored(
            file=path,
            shape=shape[::-1] if place.transposed else shape,
            dtype="F32",
            read=partial(read, kind, start, blocks, place),
        )
    return Checkpoint(where=path, config=config, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of a GGUF belongs in a Transformers checkpoint, and what is done to it on the way."""

    name: str
    heads: int | None = None  # whose features llama.cpp's llama has in another order
    transposed: bool = False  # GPT-2's matrices
    shift: int = 0  # a GGUF's Gemma multiplies by the weight, not by 1 + weight


def transformers_names(config: ModelConfig, architecture: str) -> dict[str, Place]:
    """By the names in a GGUF."""
    theirs, form = GGUF_NAMES[architecture], FORMATS[written_as(config) or config.family]
    reordered = {"attn_q": config.heads, "attn_k": config.kv_head_count} if architecture == "llama" else {}
    outer = [path for path in form.names.outer if path in theirs.outer]
    modules = [*outer, *(f"blocks.{n}.{part}" for n in range(config.layers) for part in form.names.inner)]
    places = {}
    for module in modules:
        for ours, named in zip(form.names.of(module), theirs.of(module), strict=True):
            for kind in ("weight", "bias"):
                places[f"{named}.{kind}"] = Place(
                    name=f"{ours}.{kind}",
                    heads=reordered.get(named.rpartition(".")[2]),
                    transposed=form.conv1d and kind == "weight" and "blocks." in module and "norm" not in module,
                    shift=int(config.architecture.norm == "rmsnorm_1p" and "norm" in module),
                )
    return places


def read_header(path: Path) -> tuple[Header, int]:
    """With the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return Header(file, size), size
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise Integrity(f"{path} is not a GGUF file: {shown(str(error))}") from error


def config_of(header: Header, path: Path) -> ModelConfig:
    family = header.settings.get("general.architecture")
    if not isinstance(family, str) or family not in GGUF_NAMES:
        raise BadInput(f"{path}: architecture {shown(family)} is not one we implement: {', '.join(GGUF_NAMES)} are")
    if header.settings.get("split.count", 0) not in (0, 1):
        raise BadInput(f"{path} is one of several files of a model: join them first, with llama.cpp's gguf-split")
    settings = {key.removeprefix(f"{family}."): value for key, value in header.settings.items()}
    for key, allowed in MUST_BE.items():
        if settings.get(key) not in allowed:
            raise BadInput(f"{path}: {family}.{key}={shown(settings[key])} is not what our {family} does")
    if "rope_freqs.weight" in header.tensors:
        raise BadInput(f"{path}: its rotary frequencies are scaled by a table; take the safetensors of that model")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or not embedding[0]:
        raise Integrity(f"{path}: the tensor token_embd.weight is missing")
    learned = FAMILIES[family].norm == "layernorm"
    try:
        heads, width = settings["attention.head_count"], settings["embedding_length"]
        values = {
            "family": family,
            "layers": settings["block_count"],
            "heads": heads,
            "kv_heads": settings.get("attention.head_count_kv"),
            "width": width,
            "head_dim": settings.get("attention.key_length"),
            "ffn": settings["feed_forward_length"],
            "context": settings["context_length"],
            "vocab": embedding[0][0],
            "tied": "output.weight" not in header.tensors,
            "norm_eps": settings["attention.layer_norm_epsilon" if learned else "attention.layer_norm_rms_epsilon"],
            "rope_theta": settings.get("rope.freq_base", 10000.0),
            "rope_scaling": rope_scaling_of(settings, family),
        }
        if family in ("llama", "qwen3", "gemma", "olmo2"):
            values["bias"] = bias_of(header)
        config = checked(values)
    except (BadInput, KeyError) as error:
        raise BadInput(f"{path}: {error}") from error
    if config.attention_width == config.width:
        config = replace(config, head_dim=None)
    for key in ("rope.dimension_count", "attention.value_length"):
        if settings.get(key) not in (None, config.head_width):
            told = f"{family}.{key}={shown(settings[key])}"
            raise BadInput(f"{path}: {told} is not the {config.head_width} features of a head, as in our {family}")
    window = settings.get("attention.sliding_window")
    if window and not (type(window) is int and window >= config.context):
        raise BadInput(f"{path}: {family}.attention.sliding_window={shown(window)} is shorter than its context")
    return config


def bias_of(header: Header) -> str:
    if "blk.0.attn_q.bias" not in header.tensors:
        return "none"
    if "blk.0.attn_output.bias" not in header.tensors:
        return "qkv"
    return "all" if "blk.0.ffn_down.bias" in header.tensors else "attention"


def rope_scaling_of(settings: Mapping[str, object], family: str) -> dict[str, object] | None:
    """As llama.cpp reads it: linear where no type is said, and by a factor in either spelling; 0 and 1 are none."""
    kind = settings.get("rope.scaling.type", "linear")
    known = ("type", "factor", "original_context_length", "finetuned")
    unknown = [key for key in settings if key.startswith("rope.scaling.") and key.split(".", 2)[2] not in known]
    if kind == "none":
        return None
    if kind != "linear" or unknown:
        key = "rope.scaling.type" if kind != "linear" else unknown[0]
        raise BadInput(f"{family}.{key}={shown(settings[key])} is not what our {family} does: linear scaling is")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 0.0))
    return None if factor in (0, 1) else {"type": "linear", "factor": factor}


def features_in_halves(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring features, 2i with 2i + 1, where Transformers and we turn i with i + D/2."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(path: Path) -> Tokenizer:
    settings = read_header(path)[0].settings
    ends = [settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]  # llama.cpp: all end
    return read_foreign_tokenizer(path.parent, ends=[end for end in ends if type(end) is int], gguf=path.name)
