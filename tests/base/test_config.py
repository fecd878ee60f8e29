"""What a config means where a key is left out, and what it refuses."""

import dataclasses
from typing import Any

import pytest

from isoforward.base.architecture import FAMILIES
from isoforward.base.config import ModelConfig, TrainConfig, TrainerConfig
from isoforward.base.errors import BadInput


def test_what_is_left_out_follows_the_family() -> None:
    gpt2, llama = ModelConfig(width=768, heads=12), ModelConfig(family="llama", width=4096, heads=32)
    assert gpt2.ffn_width == 3072 and gpt2.architecture.biased("qkv") and gpt2.kv_head_count == 12
    assert llama.ffn_width == 10944 and not llama.architecture.biased("qkv")  # 8/3 of the width, up to a multiple of 64
    assert dataclasses.replace(llama, kv_heads=8).kv_width == 8 * 128


def test_a_vocabulary_that_nobody_set_is_asked_for() -> None:
    with pytest.raises(BadInput, match=r"write model\.vocab=N"):
        _ = ModelConfig().vocabulary


def test_a_batch_that_processes_cannot_share_names_the_nearest_that_they_can() -> None:
    with pytest.raises(BadInput, match=r"write data\.batch=9"):
        TrainConfig(trainer=TrainerConfig(accumulate=3))


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().layers = 3  # type: ignore[misc]  # which is what is tested


def test_a_preset_gives_way_to_what_is_set() -> None:
    config = ModelConfig(family="llama", norm="layernorm", bias=True, mlp="gelu")
    assert config.architecture == dataclasses.replace(FAMILIES["llama"], norm="layernorm", bias="all", mlp="gelu")
    assert config.ffn_width == 4 * config.width


def test_rope_scaling_may_be_as_transformers_writes_it() -> None:
    theirs = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ours = {"type": "yarn", "factor": 4.0, "original_context": 64}
    assert ModelConfig(rope_scaling=theirs) == ModelConfig(rope_scaling=ours) == ModelConfig(rope_scaling=theirs | ours)
    assert ModelConfig(rope_scaling=theirs).rope_scaling == ours


def test_biases_of_before_they_had_kinds_are_all_or_none() -> None:
    assert ModelConfig(bias=True) == ModelConfig(bias="all")
    assert ModelConfig(bias=False) == ModelConfig(bias="none")
    assert ModelConfig(bias=None).architecture.bias == "all"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"norm": "rmsnrom"}, r"model\.norm=rmsnrom.*did you mean rmsnorm"),
        ({"family": "qwen3", "head_dim": 5}, r"model\.head_dim=5 is odd"),
        ({"rope_scaling": {"type": "longrope"}}, r"rope_scaling\.type=longrope is not one of linear, dynamic"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "needs original_context"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "of type yarn needs original_context"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "rope_type and type are the same"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1.0}},
            "beta_fast is no setting of",
        ),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, r"rope_scaling\.factor=nan"),
    ],
)
def test_what_no_architecture_has_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        ModelConfig(**given)


def test_validation_that_devices_cannot_share_names_how_much_they_can() -> None:
    with pytest.raises(BadInput, match=r"on 64 sequences, and each of 99 devices needs one; write .*batches=13$"):
        TrainerConfig(devices=99)
    TrainerConfig(devices=99, validation_batches=13)
