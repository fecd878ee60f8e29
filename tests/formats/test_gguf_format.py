"""GGUF files, in and out; hostile ones are read or refused."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoforward.base.errors import BadInput, Integrity, Refusal
from isoforward.formats import loading
from isoforward.model.gpt import GPT
from tests.formats.exports import TINY, logits, trained


def gguf_file(path: Path, model: GPT, **settings: object) -> Path:
    """By llama.cpp's own writer, its features of queries and keys in llama.cpp's order (convert_hf_to_gguf.permute)."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_head_count)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0])
    for key, value in settings.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_string
        add(f"llama.{key.replace('__', '.')}", value)  # type: ignore[operator]  # each takes one of the two

    def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    ours = model.state_dict()
    tensors = {"token_embd": ours["embedding.weight"], "output_norm": ours["norm.weight"]}
    if not config.tied:
        tensors["output"] = ours["unembedding.weight"]
    for n in range(config.layers):
        q, k, v = ours[f"blocks.{n}.attention.qkv.weight"].split([config.width, config.kv_width, config.kv_width])
        gate, up = ours[f"blocks.{n}.mlp.gate_up.weight"].chunk(2)
        tensors |= {
            f"blk.{n}.attn_norm": ours[f"blocks.{n}.attention_norm.weight"],
            f"blk.{n}.ffn_norm": ours[f"blocks.{n}.mlp_norm.weight"],
            f"blk.{n}.attn_q": permute(q, config.heads),
            f"blk.{n}.attn_k": permute(k, config.kv_head_count),
            f"blk.{n}.attn_v": v,
            f"blk.{n}.attn_output": ours[f"blocks.{n}.attention.out.weight"],
            f"blk.{n}.ffn_gate": gate,
            f"blk.{n}.ffn_up": up,
            f"blk.{n}.ffn_down": ours[f"blocks.{n}.mlp.down.weight"],
        }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SMALL_LLAMA = replace(TINY, family="llama", kv_heads=2, tied=False, rope_theta=500.0)


def test_a_gguf_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = trained(SMALL_LLAMA)
    assert torch.equal(logits(loading.load(gguf_file(tmp_path / "model.gguf", model))), logits(model))


@pytest.mark.parametrize("key", ["rope__scaling__factor", "rope__scale_linear"])
def test_linear_scaling_is_computed_in_either_spelling_and_one_is_none(key: str, tmp_path: Path) -> None:
    model = trained(SMALL_LLAMA)
    scaled = GPT(replace(SMALL_LLAMA, rope_scaling={"type": "linear", "factor": 4.0}))
    scaled.load_state_dict(model.state_dict())
    assert torch.equal(logits(loading.load(gguf_file(tmp_path / "4.gguf", model, **{key: 4.0}))), logits(scaled))
    assert torch.equal(logits(loading.load(gguf_file(tmp_path / "1.gguf", model, **{key: 1.0}))), logits(model))
    assert not torch.equal(logits(scaled), logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0},
        {"rope__scaling__attn_factor": 0.5},
        {"expert_count": "8"},
        {"attention__scale": 0.5},
        {"attention__sliding_window": 16.0},
        {"final_logit_softcapping": 30.0},
    ],
)
def test_a_gguf_of_another_kind_of_llama_is_refused_by_name(settings: dict[str, object], tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "model.gguf", trained(SMALL_LLAMA), **settings)
    with pytest.raises(BadInput, match=next(iter(settings)).replace("__", r"\.")):
        loading.load(file)


def test_a_gguf_is_told_by_its_beginning_whatever_its_name(tmp_path: Path) -> None:
    model = trained(SMALL_LLAMA)
    file = gguf_file(tmp_path / "sha256-4ca5e1", model)
    assert torch.equal(logits(loading.load(file)), logits(model))


def test_a_gguf_whose_counts_are_lies_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    array = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**62)
    many = b"".join(struct.pack("<Q8sIB", 8, f"{n:08}".encode(), 0, 1) for n in range(70_000))
    lies = (b"", struct.pack("<IQQ", 3, 2**62, 2**62), array, struct.pack("<IQQ", 3, 0, 70_000) + many)
    for lie in (b"", *(b"GGUF" + lie for lie in lies)):
        file.write_bytes(lie)
        with pytest.raises(Integrity, match="not a GGUF file"):
            loading.load(file)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 2200), value=st.binary(min_size=1, max_size=8), cut=st.integers(0, 60_000))
def test_a_damaged_gguf_is_read_or_refused(
    place: int, value: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = WHOLE_GGUF.setdefault(0, gguf_file(tmp_path_factory.mktemp("g") / "g", trained(SMALL_LLAMA)).read_bytes())
    file = tmp_path_factory.mktemp("damaged") / "model.gguf"
    damaged = whole[:place] + value + whole[place + len(value) :]
    file.write_bytes(damaged[:cut] if cut % 3 == 0 else damaged)
    try:
        loading.load(file)
    except Refusal as refusal:
        assert str(file) in str(refusal)


WHOLE_GGUF: dict[int, bytes] = {}
