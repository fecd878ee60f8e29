from typing import Any

import pytest
import torch

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.model.gpt import GPT, KVCache
from tests.conftest import lively, tiny


def count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize(
    ("config", "parameters", "source"),
    [
        (ModelConfig(layers=12, heads=12, width=768, context=1024, vocab=50257), 124439808, "llm.c README"),
        (
            ModelConfig(layers=12, heads=12, width=768, context=1024, vocab=50257, bias=False),
            124337664,
            "nanoGPT transformer_sizing.ipynb",
        ),
        (
            ModelConfig(
                family="llama", layers=32, heads=32, width=4096, ffn=11008, context=4096, vocab=32000, tied=False
            ),
            6738415616,
            "calflops README",
        ),
        (
            ModelConfig(
                family="llama",
                layers=32,
                heads=32,
                kv_heads=8,
                width=4096,
                ffn=14336,
                context=8192,
                vocab=128256,
                tied=False,
            ),
            8030261248,
            "Llama 3.1 model card",
        ),
    ],
)
def test_parameters_are_as_published(config: ModelConfig, parameters: Any, source: Any) -> None:
    assert count(config) == parameters, source


def test_no_position_sees_its_future(config: ModelConfig, tokens: torch.Tensor) -> None:
    model = lively(GPT(config)).eval()
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_order_matters(config: ModelConfig, tokens: torch.Tensor) -> None:
    model = lively(GPT(config)).eval()
    last = model(tokens)[:, -1]
    swapped = tokens.clone()
    swapped[:, [2, 3]] = swapped[:, [3, 2]]
    assert not torch.allclose(last, model(swapped)[:, -1], atol=1e-4)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_activations_changes_no_gradient(kind: Any, config: ModelConfig, tokens: torch.Tensor) -> None:
    plain, recomputing = GPT(config), GPT(config, checkpointing=kind)
    recomputing.load_state_dict(plain.state_dict())
    for model in (plain, recomputing):
        model(tokens).square().mean().backward()
    for one, other in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_dropout_is_for_training_alone(tokens: torch.Tensor) -> None:
    model = GPT(tiny(dropout=0.5))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_a_text_longer_than_the_context_is_refused() -> None:
    model = GPT(tiny())
    with pytest.raises(BadInput, match="33 positions are more than the model's context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_a_cache_larger_than_the_context_is_refused() -> None:
    with pytest.raises(BadInput, match="33 positions do not fit the model's context of 32"):
        KVCache(tiny(), batch=1, capacity=33, dtype=torch.float32)


def test_a_full_cache_refuses_one_more(tokens: torch.Tensor) -> None:
    model = GPT(tiny())
    cache = KVCache(tiny(), batch=3, capacity=20, dtype=torch.float32)
    model(tokens, cache)
    with pytest.raises(BadInput, match="holds 20 positions and 21 are asked for"):
        model(tokens[:, :1], cache)
