"""A model written as one GGUF file, for llama.cpp. Weights keep their dtype, norms and biases are in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isoforward.base.errors import BadInput
from isoforward.base.storage import write_atomically
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.families import written_as
from isoforward.formats.gguf_format import GGUF_NAMES, transformers_names
from isoforward.formats.gguf_tokenizer import add_tokenizer, why_not
from isoforward.formats.transformers_format import pieces
from isoforward.model.gpt import GPT

if TYPE_CHECKING:
    from gguf import GGUFWriter

LLAMA_CPP = {"mistral": "llama"}  # its name for ours


def write_gguf(model: GPT, path: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Whole or not at all. Without a tokenizer, llama.cpp takes token ids alone."""
    try:
        from gguf import GGUFWriter
        from gguf.constants import GGMLQuantizationType
    except ImportError as error:
        raise BadInput(f"{path} needs the package gguf: pip install isoforward[hf]") from error
    config, family = model.config, written_as(model.config)
    architecture = LLAMA_CPP.get(str(family), family)
    if architecture not in GGUF_NAMES:
        raise BadInput("llama.cpp has no architecture that computes this model")
    if config.rope_scaling:
        raise BadInput("rotary frequencies that are scaled are not written to GGUF")
    if tokenizer is not None and (reason := why_not(tokenizer)):
        raise BadInput(f"llama.cpp cannot read text with this tokenizer: {reason}")
    writer = GGUFWriter(path, str(architecture))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_vocab_size(config.vocabulary)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, tokenizer, config.vocabulary)
    if config.architecture.rope:
        writer.add_head_count_kv(config.kv_head_count)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_width)
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    places = {place.name: (name, place) for name, place in transformers_names(config, str(architecture)).items()}
    for theirs, views in pieces(model):
        (name, place), tensor = places[theirs], torch.cat(list(views), dim=-1).detach().cpu()
        if place.heads is not None:
            tensor = features_in_pairs(tensor, place.heads)
        tensor = tensor.T if place.transposed else tensor + place.shift
        if tensor.dtype == torch.bfloat16 and tensor.dim() == 2:
            bits = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
    write_atomically(path, lambda file: write_to(Path(file.name), writer))
    return path


def write_to(path: Path, writer: GGUFWriter) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def features_in_pairs(weight: Tensor, heads: int) -> Tensor:
    """The opposite of features_in_halves."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
