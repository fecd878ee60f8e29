"""Which class of Transformers computes a model, and what its tensors are called there."""

from __future__ import annotations

import pytest

from isoforward.base.architecture import FAMILIES
from isoforward.base.config import ModelConfig
from isoforward.formats.families import FORMATS, written_as


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_is_written_as_its_own_family_or_as_one_that_computes_the_same(family: str) -> None:
    written = written_as(ModelConfig(family=family, vocab=96))
    assert written == (family if family in FORMATS else "llama")


def test_a_part_of_another_family_is_written_as_none() -> None:
    assert written_as(ModelConfig(family="gpt2", positions="rope")) is None
    assert written_as(ModelConfig(family="llama", mlp="geglu")) is None


def test_what_we_keep_as_one_matrix_has_several_names() -> None:
    assert FORMATS["llama"].names.of("blocks.7.mlp.gate_up") == [
        "model.layers.7.mlp.gate_proj",
        "model.layers.7.mlp.up_proj",
    ]
    assert FORMATS["gpt2"].names.of("blocks.7.attention.qkv") == ["transformer.h.7.attn.c_attn"]
    assert FORMATS["gpt2"].names.of("norm") == ["transformer.ln_f"]
