"""Counts extended from few layers against counts of all of them, to the byte and to the FLOP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isoforward.plan.few_layers import Repeats, repeats

pytest.importorskip("transformers")

from isoforward.plan.counted import Counted

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "sliding_window": 32,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHORT: dict[str, tuple[int, dict[str, Any]]] = {  # layers of the whole
    "llama": (17, {}),
    "gpt2": (13, {"n_embd": 64, "n_head": 4, "n_layer": 13, "n_positions": 128}),
    "gpt_neox": (12, {}),
    "qwen3": (12, {}),
    "gemma2": (14, {}),
    "gemma3_text": (26 + 12, {}),
    "olmo2": (12, {}),
    "phi3": (12, {"pad_token_id": 0}),
    "mixtral": (12, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (12, {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": (12, {**EXPERTS, "mlp_only_layers": [0, 1]}),
    "cohere2": (24, {}),
    "diffllama": (12, {}),
    "gpt_oss": (14, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def counted(directory: Path, kind: str) -> Counted:
    layers, own = SHORT[kind]
    (directory / "config.json").write_text(
        json.dumps({**SIZES, "num_hidden_layers": layers, "model_type": kind, **own})
    )
    return Counted(directory)


QUICK = ("llama",)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in SHORT]
)
def test_few_layers_tell_the_same_as_all(tmp_path: Path, kind: str) -> None:
    short, whole = counted(tmp_path, kind), counted(tmp_path, kind)
    whole.__dict__["shorter"] = None  # so that all of it is counted
    assert short.shorter is not None
    for how in ("none", "full"):
        for batch in (1, 3):
            assert short.counted_step(batch, 48, "bf16", how) == whole.counted_step(batch, 48, "bf16", how)
    assert short.served(40, 8, "bf16") == whole.served(40, 8, "bf16")


def test_the_longest_repetition_is_found_with_what_is_before_and_after_it() -> None:
    assert repeats("d" + "a" * 20 + "z") == Repeats(start=1, period=1, times=20)
    assert repeats("ssf" * 9 + "s") == Repeats(start=0, period=3, times=9)
    assert repeats("abcdefgh") is None
    assert repeats("aaaa") is None
    assert Repeats(start=1, period=2, times=3).without(2, 8) == [0, 1, 2, 7]
