"""What a family's data says of its parts, and which rotary settings are ones."""

from __future__ import annotations

import pytest

from isoforward.base.architecture import FAMILIES, ROPE_SCALING, Architecture, checked_rope_scaling
from isoforward.base.errors import BadInput

PARTS = ("qkv", "out", "mlp", "norm")


@pytest.mark.parametrize(
    ("family", "biased"), [("gpt2", set(PARTS)), ("llama", set()), ("qwen2", {"qkv"}), ("gemma", set())]
)
def test_a_family_has_biases_where_its_papers_model_has_them(family: str, biased: set[str]) -> None:
    assert {part for part in PARTS if FAMILIES[family].biased(part)} == biased


def test_an_rmsnorm_has_no_bias_whatever_else_has() -> None:
    assert not Architecture(norm="rmsnorm", bias="all").biased("norm")
    assert Architecture(norm="layernorm", bias="all").biased("norm")


@pytest.mark.parametrize("kind", ROPE_SCALING)
def test_what_a_scaling_needs_is_enough_and_nothing_less_is(kind: str) -> None:
    needed, _ = ROPE_SCALING[kind]
    given = {key: float(n) for n, key in enumerate(needed, 2)}  # low_freq_factor below high_freq_factor
    checked_rope_scaling({"type": kind, **given})
    for key in needed:
        with pytest.raises(BadInput, match=f"of type {kind} needs {key}"):
            checked_rope_scaling({"type": kind, **given, key: None})


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ([2.0], r"model\.rope_scaling=\[2\.0\] is no table"),
        ({"type": "longrope"}, r"rope_scaling\.type=longrope is not one of linear, dynamic"),
        ({"type": "yarn", "factor": 2.0}, "needs original_context"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 1.0}, "beta_fast is no setting of"),
        ({"type": "linear", "factor": float("nan")}, r"rope_scaling\.factor=nan"),
        ({"type": "linear", "factor": True}, r"rope_scaling\.factor=True"),
        ({"type": "yarn", "factor": 2.0, "original_context": 8, "truncate": 1}, r"rope_scaling\.truncate=1"),
        (
            {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_context": 256},
            "low_freq_factor must be below",
        ),
    ],
)
def test_a_scaling_that_is_none_is_named(scaling: object, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        checked_rope_scaling(scaling)
