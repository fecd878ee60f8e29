"""Formulas against the products that the real step dispatches, and against published counts."""

from typing import Any

import pytest

from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.vocabulary import CONVENTIONS
from isoforward.measure.flops import count_training
from isoforward.model import adapter_cost as partial
from isoforward.model import cost
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT
from tests.conftest import tiny

LLAMA2_7B = ModelConfig(family="llama", layers=32, heads=32, width=4096, ffn=11008, vocab=32000, tied=False)
ADAPTERS: list[dict[str, Any]] = [
    {"name": "none"},
    *({"name": "lora", "rank": 3, "targets": targets} for targets in ([], ["q", "v"], ["out"], ["down"], ["v", "up"])),
    {"name": "lora", "rank": 3, "targets": ["out", "up"], "base": "int8"},
    *({"name": "frozen", "targets": targets} for targets in ([], ["norm"], ["blocks.1"], ["embedding"], ["blocks.0"])),
]
SHAPES = [{"family": "gpt2"}, {"family": "llama", "kv_heads": 2}, {"family": "olmo2", "tied": False}]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["family"])
@pytest.mark.parametrize(
    "how", ADAPTERS, ids=lambda how: " ".join([how["name"], *how.get("targets", []), how.get("base", "")])
)
def test_flops_and_parameters_are_those_of_the_step_that_runs(shape: dict[str, Any], how: dict[str, Any]) -> None:
    config, adapter = tiny(layers=3, **shape), AdapterConfig(**how)
    for convention in CONVENTIONS:
        size: dict[str, Any] = {"batch": 2, "length": 7, "convention": convention}
        counted = count_training(config, adapter=adapter, **size)
        assert counted["forward"] == partial.adapted_forward_flops(config, adapter, **size).total
        assert counted["backward"] == partial.adapted_backward_flops(config, adapter, **size).total
    model = adapt(GPT(config), adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == partial.trained_parameters(config, adapter)
    state = partial.adapted_training_state(config, adapter)
    assert state["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert state["gradients"] == sum(parameter.nbytes for parameter in trained)
    assert state["optimizer"] == 2 * state["gradients"]


def test_the_published_count_of_llama_2_7b() -> None:
    """4,194,304 trained of 6,742,609,920: PEFT's print_trainable_parameters for r=8 on q_proj and v_proj."""
    adapter = AdapterConfig(name="lora", rank=8, targets=["q", "v"])
    assert partial.trained_parameters(LLAMA2_7B, adapter) == 4_194_304
    assert cost.parameters(LLAMA2_7B).total + 4_194_304 == 6_742_609_920


def test_forward_is_1_plus_e_and_backward_about_1_instead_of_2() -> None:
    adapter = AdapterConfig(name="lora", rank=8, targets=["q", "v"])
    forward = cost.forward_flops(LLAMA2_7B, batch=1, length=256).total
    e = 2 * 256 * 4_194_304 / forward
    size: dict[str, Any] = {"batch": 1, "length": 256}
    assert partial.adapted_forward_flops(LLAMA2_7B, adapter, **size).total == round(forward * (1 + e))
    backward = partial.adapted_backward_flops(LLAMA2_7B, adapter, **size).total
    assert 0.98 < backward / forward < 1.02  # attention's twice weighs little here; the first layer's input is missing


def test_nothing_trained_beneath_means_no_backward_there() -> None:
    """The head alone: one product, its weight's gradient."""
    config = tiny()
    backward = partial.adapted_backward_flops(config, AdapterConfig(name="frozen"), batch=2, length=7)
    assert backward.total == backward["head"] == 2 * 2 * 7 * config.width * config.vocabulary


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"name": "lora", "rank": 33}, "adapter.rank=33 is above the width of q, 32 x 32"),
        ({"name": "lora", "targets": ["q_proj"]}, "'q_proj' matches nothing; did you mean q? there are q, k, v, out"),
        ({"name": "lora", "targets": ["dwon"]}, "'dwon' matches nothing; did you mean down?"),
        (
            {"name": "frozen", "base": "int8"},
            "adapter.base=int8 holds what stays frozen beside adapter=lora, not frozen",
        ),
        ({"name": "frozen", "targets": ["block.1"]}, "'block.1' matches nothing; did you mean blocks.1"),
        ({"name": "frozen", "targets": ["lm_head"]}, "did you mean head?"),
    ],
)
def test_what_the_model_does_not_have_is_refused_with_the_nearest(how: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        adapt(GPT(tiny()), AdapterConfig(**how))
    assert said in str(refused.value)
