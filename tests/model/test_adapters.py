from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from isoforward.base.config import AdapterConfig, ModelConfig, OptimConfig
from isoforward.formats.export import fingerprint, freeze, merged, without_adapter
from isoforward.model.adapters import AdaptedLinear, adapt, is_low_rank, linears_of
from isoforward.model.gpt import GPT
from isoforward.model.optim import build
from isoforward.model.steps import train_step
from tests.conftest import lively, tiny

LORA = AdapterConfig(name="lora", rank=4)
INT8 = replace(LORA, targets=["v", "down"], base="int8")


def adapted(config: ModelConfig, adapter: AdapterConfig = LORA, **how: Any) -> GPT:
    torch.manual_seed(3)
    return lively(adapt(lively(GPT(config, **how)), adapter))


def test_an_adapter_changes_nothing_before_it_is_trained(config: ModelConfig, tokens: Tensor) -> None:
    model = lively(GPT(config))
    before = model(tokens)
    assert torch.equal(adapt(model, LORA)(tokens), before)


@pytest.mark.parametrize("adapter", [LORA, INT8], ids=lambda adapter: adapter.base)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_lives_share_the_bits_with_an_adapter_and_merged(
    config: ModelConfig, tokens: Tensor, dtype: torch.dtype, adapter: AdapterConfig
) -> None:
    model = adapted(config, adapter, dtype=dtype)
    assert torch.equal(freeze(model)(tokens), model(tokens))
    plain = merged(model)
    assert torch.equal(freeze(plain)(tokens), plain(tokens))


def test_merging_changes_logits_by_rounding_alone(config: ModelConfig, tokens: Tensor) -> None:
    """And far less than the adapter does: W + scale B A, of the right maps, with the right scale."""
    model = adapted(config)
    by_hand = model.double()
    model.dtype = torch.float64
    exact = by_hand(tokens)
    model = adapted(config)
    with_adapter, plain, base = (each(tokens) for each in (model, merged(model), without_adapter(model)))
    assert (base - exact).abs().max() > 0.1
    for logits in (with_adapter, plain):
        torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=1e-4)  # fp32's of the design


def test_targets_are_maps_of_their_own_within_a_fused_matrix(tokens: Tensor) -> None:
    model = adapted(tiny(), replace(LORA, targets=["v"]))
    for path, layer in linears_of(model, AdaptedLinear):
        assert path.endswith("attention.qkv")
        q, k, v = (layer.merged_weight(torch.float32) - layer.weight).split(32)
        assert not q.any() and not k.any() and v.any()


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("how", [{"name": "lora", "rank": 2}, {"name": "frozen", "targets": ["blocks.1", "head"]}])
def test_a_step_moves_what_is_trained_and_nothing_else(name: str, how: dict[str, Any], tokens: Tensor) -> None:
    model = adapted(tiny(), AdapterConfig(**how))
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    train_step(model, build(model, OptimConfig(name=name)), tokens[:, :-1], tokens[:, 1:])
    moved = {path for path, parameter in model.named_parameters() if not torch.equal(parameter, before[path])}
    if how["name"] == "lora":
        assert moved == {path for path in before if is_low_rank(path)}
    else:
        assert moved == {path for path in before if path.startswith(("blocks.1.", "unembedding."))}
    held = sum(value.numel() for state in build(model, OptimConfig(name=name)).state.values() for value in state)
    assert held == 0


def test_a_tied_head_that_is_trained_alone_leaves_the_embedding() -> None:
    model = adapt(GPT(tiny(tied=True)), AdapterConfig(name="frozen"))
    assert not model.config.tied
    assert model.unembedding.weight is not model.embedding.weight
    assert torch.equal(model.unembedding.weight, model.embedding.weight)


@pytest.mark.parametrize("adapter", [LORA, INT8], ids=lambda adapter: adapter.base)
def test_gradients_pass_checkpointed_blocks(tokens: Tensor, adapter: AdapterConfig) -> None:
    """In which an operation in place on what is kept would fail."""
    found = []
    for checkpointing in ("none", "selective", "full"):
        model = adapted(tiny(), adapter, checkpointing=checkpointing)
        model(tokens).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same)


def test_the_base_is_known_again_under_its_adapter() -> None:
    base = lively(GPT(tiny()))
    known = fingerprint(base)
    model = lively(adapt(GPT(tiny()), LORA))
    model.load_state_dict(base.state_dict(), strict=False)
    assert fingerprint(without_adapter(model)) == known
