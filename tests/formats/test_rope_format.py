"""Rotary settings of config.json, in the spellings of Transformers 4 and 5."""

from __future__ import annotations

import pytest

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.formats.rope_format import ORIGINAL, rope_from_transformers, rope_to_transformers

SCALINGS: list[dict[str, object] | None] = [
    None,
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 64},
    {"type": "yarn", "factor": 4.0, "original_context": 64, "beta_fast": 16.0, "truncate": False},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_written_is_read_back(scaling: dict[str, object] | None) -> None:
    config = ModelConfig(family="llama", rope_theta=500.0, rope_scaling=scaling)
    read = rope_from_transformers(rope_to_transformers(config))
    assert read == {"rope_theta": 500.0} | ({} if scaling is None else {"rope_scaling": scaling})


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_all_spellings_mean_the_same(raw: dict[str, object]) -> None:
    assert rope_from_transformers(raw) == {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}


def test_yarn_without_a_factor_stretches_the_original_context_to_the_whole() -> None:
    raw = {"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", ORIGINAL: 1024}}
    assert rope_from_transformers(raw)["rope_scaling"] == {"type": "yarn", "factor": 4.0, "original_context": 1024}


def test_what_a_type_does_not_read_is_left_out() -> None:
    raw = {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}
    assert rope_from_transformers(raw)["rope_scaling"] == {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_scaling": {"type": "longrope"}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
    ],
)
def test_what_our_forward_does_not_do_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="is not one we implement"):
        rope_from_transformers(raw)


def test_settings_that_are_no_table_are_refused() -> None:
    with pytest.raises(BadInput, match=r"rope_scaling=\[1\] is not a table"):
        rope_from_transformers({"rope_scaling": [1]})
