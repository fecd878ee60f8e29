from dataclasses import replace

import pytest
import torch
from torch import Tensor

from isoforward.base.config import ModelConfig
from isoforward.formats.export import without_adapter
from isoforward.model.adapters import adapt, is_low_rank, linears_of
from isoforward.model.frozen_linear import FrozenLinear
from isoforward.model.gpt import GPT
from tests.conftest import lively, tiny
from tests.model.test_adapters import INT8, adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_int8_it_trains_as_over_the_rounded_weights_themselves(
    config: ModelConfig, tokens: Tensor, dtype: torch.dtype
) -> None:
    """The same products of the same numbers, forward and backward."""
    over_int8 = adapted(config, INT8, dtype=dtype)
    rounded = adapt(without_adapter(over_int8), replace(INT8, base="full"))
    pairs = {name: tensor for name, tensor in over_int8.state_dict().items() if is_low_rank(name)}
    rounded.load_state_dict(pairs, strict=False)
    found = []
    for model in (over_int8, rounded):
        logits = model(tokens)
        logits.float().square().mean().backward()
        found.append([logits, *(p.grad for name, p in model.named_parameters() if is_low_rank(name))])
    for one, same in zip(*found, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)


def test_int8_is_within_half_a_step_of_each_weight() -> None:
    base = lively(GPT(tiny()))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    after = without_adapter(adapt(base, INT8)).state_dict()
    for name, tensor in before.items():
        if name.startswith("blocks.") and name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight")):
            step = tensor.abs().amax(1, keepdim=True) / 127
            assert not torch.equal(after[name], tensor)
            assert ((after[name] - tensor).abs() <= 0.5001 * step).all()
        else:
            assert torch.equal(after[name], tensor)


def test_an_int8_base_keeps_no_rounded_copy_for_the_backward(tokens: Tensor) -> None:
    kept: list[Tensor] = []
    model = adapted(tiny(), INT8)
    shapes = {layer.weight.shape for _, layer in linears_of(model, FrozenLinear)}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(tokens)
    of_weights = [tensor for tensor in kept if tensor.shape in shapes]
    assert of_weights and all(tensor.dtype == torch.int8 for tensor in of_weights)
