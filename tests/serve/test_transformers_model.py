"""Architectures that we do not implement, tiny and random, through the steps that our own model goes through."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from isoforward.base.config import OptimConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.measure import transformers_lives
from isoforward.model import steps
from isoforward.serve.transformers_model import WrappedCache, described, frozen_copy, load_wrapped

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
OTHERS: dict[str, Any] = {  # what an architecture wants beside SIZES
    "gpt_neox": {},  # Pythia
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"alibi": False},
    "bloom": {},
    "phi": {},
    "stablelm": {},
}
TOKENS = torch.randint(1, 96, (1, 20), generator=torch.Generator().manual_seed(0))
logging.getLogger("transformers").setLevel(logging.ERROR)


def saved(kind: str, directory: Path, **more: object) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | NO_TOKENS | OTHERS.get(kind, {}) | more))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", OTHERS)
def test_any_architecture_runs_through_the_steps_and_gives_the_logits_of_transformers(
    kind: Any, tmp_path: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(saved(kind, tmp_path)).eval()
    with torch.no_grad():
        expected = reference(TOKENS).logits
    model = load_wrapped(tmp_path, dtype=torch.float32)
    frozen: Any = frozen_copy(model)
    torch.testing.assert_close(frozen(TOKENS), expected)
    torch.testing.assert_close(steps.decode_uncached(frozen, TOKENS), expected[:, -1])
    cache: Any = WrappedCache(frozen)
    served = [steps.prefill(frozen, TOKENS[:, :12], cache)]
    served += [steps.decode(frozen, TOKENS[:, n : n + 1], cache) for n in range(12, 20)]
    torch.testing.assert_close(torch.stack(served, 1), expected[:, 11:], atol=1e-5, rtol=1e-4)
    assert cache.length == 20
    optimizer = transformers_lives.optimizer_of(model, OptimConfig())
    losses = [steps.train_step(model, optimizer, TOKENS[:, :-1], TOKENS[:, 1:])[0].item() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_a_cache_holds_the_length_that_it_is_set_to_and_goes_on_from_there(tmp_path: Path) -> None:
    model: Any = frozen_copy(load_wrapped(saved("mistral", tmp_path), dtype=torch.float32))
    cache: Any = WrappedCache(model)
    for length in (30, 3, 30, 0):
        cache.rewind(length)
        assert cache.length == length
        steps.decode(model, TOKENS[:, :1], cache)
        assert cache.length == length + 1
    cache.rewind(3)
    again = steps.decode(model, TOKENS[:, :1], cache)
    zeros = torch.cat((torch.zeros(1, 3, dtype=torch.long), TOKENS[:, :1]), 1)
    torch.testing.assert_close(again, model(zeros)[:, -1], atol=1e-5, rtol=1e-4)


# What is refused


def rewrite(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    saved("opt", tmp_path / "model")
    code = f"open({str(ran)!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    (tmp_path / "model" / "own.py").write_text(code)
    rewrite(tmp_path / "model", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    load_wrapped(tmp_path / "model", dtype=torch.float32)  # an architecture that Transformers has: its own code
    rewrite(tmp_path / "model", model_type="own")
    with pytest.raises(BadInput, match="code from a checkpoint is never run"):
        described(tmp_path / "model")
    assert not ran.exists()


def test_no_source_trusts_remote_code() -> None:
    for path in Path(transformers_lives.__file__).parent.glob("*.py"):
        assert "trust_remote_code=True" not in path.read_text().replace(" ", "")


def test_a_missing_tensor_is_named_and_not_drawn_at_random(tmp_path: Path) -> None:
    path = saved("gpt_neox", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Integrity, match=r"layers\.1\.mlp\.dense_h_to_4h\.weight"):
        load_wrapped(tmp_path, dtype=torch.float32)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path = saved("gpt_neox", tmp_path) / "model.safetensors"
    torch.save(load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(BadInput, match="safetensors"):
        load_wrapped(tmp_path, dtype=torch.float32)


def test_a_model_without_keys_and_values_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="MambaForCausalLM"):
        described(saved("mamba", tmp_path, state_size=4))
