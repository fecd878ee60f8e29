"""Counting on meta against our own exact formulas of the same architecture, and refusals that name what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.model import cost, footprint
from isoforward.plan.subject import Serving, Setup

pytest.importorskip("transformers")

from isoforward.plan.counted import Counted

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
}
OURS = ModelConfig(family="llama", layers=3, heads=4, kv_heads=2, width=64, ffn=96, context=128, vocab=200, tied=False)


def written(directory: Path, **keys: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(LLAMA | keys))
    return directory


def test_what_is_counted_is_what_the_formulas_say_of_the_same_architecture(tmp_path: Path) -> None:
    counted, serving = Counted(written(tmp_path)), Serving(users=3, prompt=40, new_tokens=8)
    assert counted.parameters == cost.parameters(OURS).total
    setup = Setup(batch=4, length=64, accumulate=2)
    forward = cost.forward_flops(OURS, batch=4, length=64)
    assert (
        counted.step(setup).flops
        == (forward + cost.backward_flops(OURS, batch=4, length=64, convention="hardware")).total
    )
    assert counted.kv_bytes(serving) == footprint.kv_bytes(OURS, batch=3, length=48)
    assert counted.prefill(serving).flops == cost.forward_flops(OURS, batch=1, length=40, logits="last").total
    assert counted.decode(serving).flops == 3 * cost.decode_flops(OURS, batch=1, cached=40).total


def test_the_state_of_bf16_training_is_two_bytes_a_number(tmp_path: Path) -> None:
    counted = Counted(written(tmp_path))
    held = counted.training(Setup(batch=2, length=64, accumulate=2), fused_norm=True)["optimizer"]
    count = counted.parameters
    assert held["optimizer"] == 2 * 2 * count
    assert held["gradients"] == 2 * count
    assert held["weights"] == pytest.approx(2 * count, rel=0.01)  # and the rotary frequencies


def test_checkpointing_holds_less_and_computes_more(tmp_path: Path) -> None:
    counted = Counted(written(tmp_path), most=8)
    plain, recomputing = (Setup(batch=8, length=128, checkpointing=how) for how in ("none", "full"))
    less, more = (counted.training(setup, fused_norm=True)["loss"]["activations"] for setup in (recomputing, plain))
    assert less < 0.6 * more
    assert 1.2 < counted.step(recomputing).flops / counted.step(plain).flops < 4 / 3


def test_smaller_batches_lie_at_or_below_the_line_that_is_drawn(tmp_path: Path) -> None:
    directory = written(tmp_path)
    drawn = Counted(directory, most=8)
    for batch in (1, 3, 8):
        setup = Setup(batch=batch, length=64)
        exact = Counted(directory, most=max(batch, 2)).training(setup, fused_norm=True)
        for phase, parts in drawn.training(setup, fused_norm=True).items():
            assert parts.total >= exact[phase].total - 8  # of rounding
            assert batch == 3 or parts.total == pytest.approx(exact[phase].total, abs=8)


def test_experts_are_read_as_far_as_users_differ(tmp_path: Path) -> None:
    keys = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
    counted = Counted(written(tmp_path, **keys, num_experts_per_tok=2))
    one, many = (counted.decode(Serving(users=n, prompt=16, new_tokens=2)).moved_bytes for n in (1, 64))
    assert one < 2 * counted.parameters
    assert many > 2 * counted.parameters


def test_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="model_type 'nosuch' is no causal LM"):
        Counted(written(tmp_path, model_type="nosuch"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "64.*is not a multiple of the number"),
    ],
)
def test_sizes_that_contradict_are_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Counted(written(tmp_path, **keys))


def test_an_optimizer_that_must_know_the_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="optimizer=muon"):
        Counted(written(tmp_path)).training(Setup(batch=1, length=16, optimizer="muon"), fused_norm=True)
