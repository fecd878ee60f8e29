"""GGUF files, in and out; hostile ones are read or refused."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoforward.base.errors import BadInput, Integrity, Refusal
from isoforward.formats import export as export_module
from isoforward.formats.export import freeze
from isoforward.formats.gguf_format import write_gguf
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
        writer.add_string(f"llama.{key.replace('__', '.')}", str(value))

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
    assert torch.equal(logits(export_module.load(gguf_file(tmp_path / "model.gguf", model))), logits(model))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    return {one.name: torch.tensor(dequantize(one.data, one.tensor_type)) for one in GGUFReader(path).tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_is_written_as_llama_cpps_own_converter_orders_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = freeze(trained(SMALL_LLAMA), dtype=dtype)
    found = tensors_of(write_gguf(model, tmp_path / "ours.gguf"))
    expected = tensors_of(gguf_file(tmp_path / "theirs.gguf", freeze(model, dtype=torch.float32)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    read_back = export_module.load(tmp_path / "ours.gguf", dtype=dtype)
    assert torch.equal(logits(read_back), logits(model))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt2_is_written_in_the_layout_of_a_linear_layer(bias: bool, tmp_path: Path) -> None:
    model = freeze(trained(replace(TINY, bias=bias, tied=False)))
    found, ours = tensors_of(write_gguf(model, tmp_path / "model.gguf")), model.state_dict()
    assert torch.equal(found["blk.1.attn_qkv.weight"], ours["blocks.1.attention.qkv.weight"])
    assert torch.equal(found["blk.0.ffn_up.weight"], ours["blocks.0.mlp.up.weight"])
    assert torch.equal(found["position_embd.weight"], ours["positions.weight"])
    assert torch.equal(found["output.weight"], ours["unembedding.weight"])
    shift = ours["blocks.1.attention.qkv.bias"] if bias else torch.zeros(3 * TINY.width)
    assert torch.equal(found["blk.1.attn_qkv.bias"], shift)
    assert len(found) == 3 + 2 + 12 * TINY.layers  # embeddings and head, the last norm, and each block's


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_llama_cpp_gives_the_logits_of_the_model_that_was_written(family: str, tmp_path: Path) -> None:
    """Its GELU is a table in fp16: 1e-3 of logits of about one."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, which builds for minutes")
    model = freeze(trained(replace(TINY, family=family)))
    path = str(write_gguf(model, tmp_path / "model.gguf"))
    theirs = llama_cpp.Llama(path, n_ctx=TINY.context, n_threads=1, type_k=0, type_v=0, verbose=False)
    tokens = list(range(1, 13))
    theirs.eval(tokens)
    found = torch.tensor(llama_cpp.llama_get_logits_ith(theirs.ctx, -1)[: TINY.vocab])
    theirs.close()
    torch.testing.assert_close(found, model(torch.tensor([tokens]))[0, -1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"rope__scaling__type": "yarn"}, {"expert_count": "8"}])
def test_a_gguf_of_another_kind_of_llama_is_refused_by_name(settings: dict[str, str], tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "model.gguf", trained(SMALL_LLAMA), **settings)
    with pytest.raises(BadInput, match=next(iter(settings)).replace("__", r"\.")):
        export_module.load(file)


def test_a_gguf_whose_counts_are_lies_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    array = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**62)
    many = b"".join(struct.pack("<Q8sIB", 8, f"{n:08}".encode(), 0, 1) for n in range(70_000))
    lies = (b"", struct.pack("<IQQ", 3, 2**62, 2**62), array, struct.pack("<IQQ", 3, 0, 70_000) + many)
    for lie in (b"", *(b"GGUF" + lie for lie in lies)):
        file.write_bytes(lie)
        with pytest.raises(Integrity, match="not a GGUF file"):
            export_module.load(file)


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
        export_module.load(file)
    except Refusal as refusal:
        assert str(file) in str(refusal)


WHOLE_GGUF: dict[int, bytes] = {}
