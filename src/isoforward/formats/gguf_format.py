"""Weights as llama.cpp keeps them: one GGUF file, often in quantized blocks, a Llama's queries and keys reordered.

The header is read here and not with the package `gguf`, whose reader believes every count in it and can be made to
loop for ever; that package turns blocks into numbers.
"""

from __future__ import annotations

import math
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.transformers_format import pieces
from isoforward.formats.transformers_tokenizer import read_foreign_tokenizer
from isoforward.formats.untrusted import Checkpoint, Stored, checked, shown
from isoforward.model.gpt import GPT

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
COUNT_LIMIT, STRING_LIMIT = 2**16, 2**22  # far above any real file's
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

GPT2_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
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

    def setting(self) -> tuple[str, Any]:
        return self.string(), self.value(self.number("I"))

    def value(self, kind: int) -> Any:
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
    reordered = {"attn_q": config.heads, "attn_k": config.kv_head_count}

    def read(kind: Any, start: int, shape: tuple[int, ...], heads: int | None) -> Tensor:
        blocks = np.array(np.memmap(path, np.uint8, mode="r", offset=start, shape=shape))
        numbers = torch.from_numpy(dequantize(blocks, kind))
        return numbers if heads is None else features_in_halves(numbers, heads)

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
        blocks = (*shape[:-1], shape[-1] // block * block_bytes)
        heads = reordered.get(part_of(name))
        tensors[transformers_name(name, path)] = Stored(
            shape=shape, dtype=torch.float32, read=partial(read, kind, start, blocks, heads)
        )
    return Checkpoint(where=path, config=config, tensors=tensors)


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
    settings = header.settings
    architecture = settings.get("general.architecture")
    if architecture != "llama":
        raise BadInput(f"{path}: architecture {shown(architecture)} is not one we implement: llama is")
    for key, allowed in (("llama.expert_count", (None, 0)), ("llama.rope.scaling.type", (None, "none"))):
        if settings.get(key) not in allowed:
            raise BadInput(f"{path}: {key}={shown(settings[key])} is not what our llama does")
    if "rope_freqs.weight" in header.tensors:
        raise BadInput(f"{path}: its rotary frequencies are scaled by a table; take the safetensors of that model")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or not embedding[0]:
        raise Integrity(f"{path}: the tensor token_embd.weight is missing")
    try:
        config = checked(
            {
                "family": "llama",
                "layers": settings["llama.block_count"],
                "heads": settings["llama.attention.head_count"],
                "kv_heads": settings.get("llama.attention.head_count_kv"),
                "width": settings["llama.embedding_length"],
                "ffn": settings["llama.feed_forward_length"],
                "context": settings["llama.context_length"],
                "vocab": embedding[0][0],
                "tied": "output.weight" not in header.tensors,
                "bias": "blk.0.attn_q.bias" in header.tensors,
                "norm_eps": settings["llama.attention.layer_norm_rms_epsilon"],
                "rope_theta": settings.get("llama.rope.freq_base", 10000.0),
            }
        )
    except (BadInput, KeyError) as error:
        raise BadInput(f"{path}: {error}") from error
    for key in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        if settings.get(key) not in (None, config.head_width):
            raise BadInput(f"{path}: {key}={shown(settings[key])} is not width / heads, as in our llama")
    return config


def part_of(name: str) -> str:
    """attn_q of blk.7.attn_q.weight"""
    return name.rpartition(".")[0].rpartition(".")[2]


def transformers_name(name: str, path: Path) -> str:
    part, (first, *rest) = part_of(name), name.split(".")
    kind = rest[-1] if rest else ""
    if part in NAMES and len(rest) == 1:
        return f"{NAMES[part]}.{kind}"
    if part in NAMES and first == "blk" and len(rest) == 3:
        return f"model.layers.{rest[0]}.{NAMES[part]}.{kind}"
    raise BadInput(f"{path}: the tensor {shown(name)} has no place in our llama")


def features_in_pairs(weight: Tensor, heads: int) -> Tensor:
    """The opposite of features_in_halves."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def features_in_halves(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring features, 2i with 2i + 1, where Transformers and we turn i with i + D/2."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: GPT, path: Path) -> Path:
    """Weights alone, without a tokenizer: for llama.cpp to be measured on token ids. Norms and biases are fp32."""
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType

    config, family = model.config, model.config.family
    if config.rope_scaling:
        raise BadInput("rotary frequencies that are scaled are not written to GGUF")
    writer = GGUFWriter(path, family)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_vocab_size(config.vocabulary)
    writer.add_tokenizer_model("none")
    if family == "llama":
        writer.add_head_count_kv(config.kv_head_count)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_width)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    reordered = {"attn_q": config.heads, "attn_k": config.kv_head_count}
    for theirs, views in pieces(model):
        name, tensor = gguf_name(theirs, family), torch.cat(list(views), dim=-1).detach().cpu()
        if part_of(name) in reordered:
            tensor = features_in_pairs(tensor, reordered[part_of(name)])
        if family == "gpt2" and tensor.dim() == 2 and theirs.startswith("transformer.h."):
            tensor = tensor.T  # Transformers' GPT-2 keeps (in, out), llama.cpp as everyone (out, in)
        if tensor.dtype == torch.bfloat16 and tensor.dim() == 2:
            bits = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(theirs: str, family: str) -> str:
    """blk.7.attn_q.weight of model.layers.7.self_attn.q_proj.weight"""
    names = GPT2_NAMES if family == "gpt2" else {value.removeprefix("model."): key for key, value in NAMES.items()}
    stem, _, kind = theirs.removeprefix("transformer.").removeprefix("model.").rpartition(".")
    if stem in names:
        return f"{names[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)  # h.7.ln_1, layers.7.self_attn.q_proj
    return f"blk.{layer}.{names[part]}.{kind}"


def read_tokenizer(path: Path) -> Tokenizer:
    settings = read_header(path)[0].settings
    ends = [settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]  # llama.cpp: all end
    return read_foreign_tokenizer(path.parent, ends=[end for end in ends if type(end) is int], gguf=path.name)
