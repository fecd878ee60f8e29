"""What a config means where a key is left out, and what it refuses."""

import dataclasses

import pytest

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
