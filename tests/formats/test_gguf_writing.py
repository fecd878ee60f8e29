"""GGUF files of ours: what llama.cpp's own converter writes of the same weights, and read as the same model."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats import loading
from isoforward.formats.export import freeze
from isoforward.formats.gguf_writing import write_gguf
from isoforward.serve.inference import load as serve
from tests.formats.exports import TINY, TOKENS, logits, trained
from tests.formats.test_gguf_format import SMALL_LLAMA, gguf_file


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
    read_back = loading.load(tmp_path / "ours.gguf", dtype=dtype)
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


OF_EACH_FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "mistral": {"kv_heads": 2, "head_dim": 12},
    "qwen2": {"kv_heads": 2},
    "qwen3": {"kv_heads": 2, "head_dim": 16, "tied": False},
    "olmo2": {"kv_heads": 2},
    "gemma": {"kv_heads": 1, "head_dim": 16},
}


@pytest.mark.parametrize("family", OF_EACH_FAMILY)
def test_what_is_written_of_a_family_is_read_as_the_same_model(family: str, tmp_path: Path) -> None:
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    model = freeze(trained(replace(TINY, family=family, **OF_EACH_FAMILY[family])))
    path = write_gguf(model, tmp_path / "model.gguf")
    assert torch.equal(logits(loading.load(path)), logits(model))
    architecture = next(
        arch for arch, name in MODEL_ARCH_NAMES.items() if name == {"mistral": "llama"}.get(family, family)
    )
    known = {TENSOR_NAMES[kind] for kind in MODEL_TENSORS[architecture]}
    named = {re.sub(r"^blk\.\d+\.", "blk.{bid}.", name.rpartition(".")[0]) for name in tensors_of(path)}
    assert named <= known


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_a_written_gguf_as_the_same_model(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = freeze(trained(replace(TINY, family=family, kv_heads=2)))
    write_gguf(model, tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_a_gguf_is_a_checkpoint_that_text_is_generated_with(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = Tokenizer.train_bpe(["the king and the queen went down to the sea. " * 20], 270)
    model = freeze(trained(replace(SMALL_LLAMA, vocab=tokenizer.vocabulary)))
    write_gguf(model, tmp_path / "model.gguf", tokenizer)
    module = serve(tmp_path / "model.gguf")
    assert module.encode("the king went") == tokenizer.encode("the king went")
    assert isinstance(module.generate("the king", max_new_tokens=4, temperature=0), str)
    with pytest.raises(BadInput, match=r"take its model\.gguf: checkpoint=\S+/model\.gguf"):
        serve(tmp_path)
