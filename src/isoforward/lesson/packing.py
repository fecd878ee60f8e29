"""A model and its tokenizer as a page can hold them: plain JSON, with the weights in 16 or 8 bits."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from isoforward.base.architecture import FAMILIES
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer, cuts_as_gpt2
from isoforward.model.gpt import GPT

LARGEST_HALF = 65504.0


class Processor(TypedDict, total=False):
    type: str
    processors: list[Processor]
    single: list[dict[str, object]]


class Added(TypedDict):
    content: str
    special: bool


class TokenizerFile(TypedDict, total=False):
    """A tokenizer.json: what is read of it."""

    model: dict[str, object]
    normalizer: dict[str, object] | None
    pre_tokenizer: dict[str, object] | None
    post_processor: Processor | None
    added_tokens: list[Added]


class Weights(TypedDict):
    tensors: list[dict[str, object]]  # name, shape and bits of each
    data: str  # of one after the other, deflated, in base64


class PackedModel(TypedDict):
    config: dict[str, object]
    weights: Weights
    bits: int


def packed_model(model: GPT, bits: int) -> PackedModel:
    """`weights`: matrices in `bits`, vectors in fp32, deflated. weights.js is the way back."""
    c = model.config
    config = {
        "family": forward_of(c),
        "layers": c.layers,
        "heads": c.heads,
        "kv_heads": c.kv_head_count,
        "width": c.width,
        "head_width": c.head_width,
        "ffn_width": c.ffn_width,
        "context": c.context,
        "vocab": c.vocabulary,
        "tied": c.tied,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
    }
    tensors, parts = list[dict[str, object]](), list[bytes]()
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().cpu().numpy()
        kept, data = pack(values, bits)
        tensors.append({"name": name, "shape": list(values.shape), "bits": kept})
        parts.append(data)
    deflated = base64.b64encode(zlib.compress(b"".join(parts), 9)).decode()
    return {"config": config, "weights": {"tensors": tensors, "data": deflated}, "bits": bits}


def pack(values: npt.NDArray[np.float32], bits: int) -> tuple[int, bytes]:
    """The bits that were really taken, and the bytes, little-endian."""
    if values.ndim < 2:
        return 32, values.astype("<f4").tobytes()
    if bits == 16 and np.abs(values).max(initial=0) <= LARGEST_HALF:
        halves = values.astype("<f2").view(np.uint8).reshape(-1, 2)
        return 16, halves[:, 1].tobytes() + halves[:, 0].tobytes()  # alike bytes together deflate better
    scales = np.maximum(np.abs(values).max(axis=1), 1e-12).astype(np.float32) / np.float32(127)
    integers = np.clip(np.rint(values / scales[:, None]), -127, 127).astype(np.int8)
    return 8, integers.tobytes() + scales.astype("<f4").tobytes()


def forward_of(config: ModelConfig) -> str:
    """Which of the two forwards of gpt.js computes `config`: gpt2 or llama, both with biases or without."""
    plain = config.attention_width == config.width
    scaled = (config.rope_scaling or {}).get("type", "llama3")
    for family in ("gpt2", "llama"):
        preset = FAMILIES[family]
        if plain and scaled == "llama3" and replace(config.architecture, bias=preset.bias) == preset:
            return family
    raise BadInput(
        f"the page computes the forwards of GPT-2 and Llama, and this model's is another (family {config.family}); "
        "train one with model.family=gpt2 or model.family=llama, and what else of model.* is theirs"
    )


def packed_tokenizer(tokenizer: Tokenizer) -> dict[str, object]:
    """BadInput for a tokenizer that tokenizer.js does not know: it must be byte-level BPE, or single characters."""
    backend: Backend = tokenizer.backend
    told = json.loads(backend.to_str())
    if what := beyond_a_page(told):
        raise BadInput(
            f"the page knows the byte-level BPE of GPT-2 and single characters, and this model's tokenizer {what}; "
            "train a model with data.tokenizer=bpe or data.tokenizer=char"
        )
    tokens = [backend.id_to_token(id) or "" for id in range(tokenizer.vocabulary)]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in told["model"].get("merges", ())]
    return {
        "tokens": tokens,
        "merges": merges,
        "byte_level": told.get("pre_tokenizer") is not None,
        "special": sorted(tokenizer.special),
        "start": tokenizer.start,  # what an empty text begins with
        "ends": list(tokenizer.ends),
    }


def beyond_a_page(told: TokenizerFile) -> str | None:
    """What a tokenizer.json has that tokenizer.js does not do, or nothing."""
    model, before = told["model"], told.get("pre_tokenizer")
    if model["type"] != "BPE":
        return f"is {model['type']}"
    if normalizer := told.get("normalizer"):
        return f"has a normalizer, {normalizer['type']}"
    settings = ("dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix", "continuing_subword_prefix")
    if chosen := next(filter(model.get, settings), None):
        return f"sets {chosen}"
    if before is not None and not cuts_as_gpt2(before):
        return f"splits text into words in another way, {before['type']}"
    if adds_tokens(told.get("post_processor")):
        return "adds tokens to every text"
    others = [token["content"] for token in told.get("added_tokens", ()) if not token["special"]]
    return f"has an added token that is not special, {others[0]!r}" if others else None


def adds_tokens(after: Processor | None) -> bool:
    """A template may name the text alone, as Transformers writes it."""
    if after is None or after["type"] == "ByteLevel":
        return False
    if after["type"] == "Sequence":
        return any(map(adds_tokens, after["processors"]))
    return after["type"] != "TemplateProcessing" or any("SpecialToken" in piece for piece in after["single"])
