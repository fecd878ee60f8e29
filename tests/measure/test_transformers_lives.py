"""Both lives of architectures that we do not implement, tiny and random: counted, timed and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from isoforward.base.config import MeasureConfig, ModelConfig
from isoforward.base.results import Results, read, write
from isoforward.base.vocabulary import TRAINING
from isoforward.measure import transformers_lives
from isoforward.measure.case import Case
from isoforward.measure.flops import count_decode, count_training
from isoforward.measure.passes import merged, time_here
from isoforward.serve.transformers_model import described
from isoforward.show.compare import compare
from tests.serve.test_transformers_model import NO_TOKENS, OTHERS, saved


def case(directory: Path, **more: Any) -> Case:
    model, labels = described(directory)
    return Case(experiment="phase_costs", model=model, labels=labels, batch=2, length=24, **more)


@pytest.mark.parametrize("kind", OTHERS)
def test_the_flops_of_any_architecture_are_counted_with_twice_the_forward_in_the_backward(
    kind: Any, tmp_path: Path
) -> None:
    subject = case(saved(kind, tmp_path), measure=MeasureConfig(prompt=16, new_tokens=4))
    forward, loss, backward, optimizer, served, *_ = transformers_lives.count(subject, "model")
    assert (loss, optimizer, served) == (0, 0, forward)
    assert backward == 2 * forward > 0


def test_the_flops_of_gpt2_are_those_of_our_own_gpt2(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, **NO_TOKENS)
    ).save_pretrained(tmp_path)
    subject = case(tmp_path, measure=MeasureConfig(prompt=16, new_tokens=4))
    counted = transformers_lives.count(subject, "model")
    ours = ModelConfig(layers=2, heads=4, width=32, context=64, vocab=96)
    theirs = count_training(ours, batch=2, length=24)
    assert counted[:4] == [theirs.get(phase, 0) for phase in TRAINING]
    assert counted[6] == count_decode(ours, batch=1, cached=18)


def test_a_mixture_of_experts_costs_what_its_chosen_experts_cost(tmp_path: Path) -> None:
    """Each of 48 tokens goes through 2 of 4 experts, whichever they are."""
    subject = case(saved("mixtral", tmp_path))
    C, F, V, T, tokens = 32, 56, 96, 24, 48
    projections = 2 * C * (C + 16 + 16 + C)  # queries, two key and two value heads of 8, output
    experts = 2 * (2 * 3 * C * F) + 2 * C * 4  # gate, up, down, twice; the router
    attention = 4 * C * T
    assert transformers_lives.count(subject, "model")[0] == tokens * (
        2 * (projections + experts + attention) + 2 * C * V
    )


def timed(kind: Any, tmp_path: Path) -> Results:
    measure = MeasureConfig(repeats=5, warmup=1, prompt=8, new_tokens=4, context=32)
    subject = case(saved(kind, tmp_path / kind), measure=measure)
    where, records = merged(subject, [time_here(subject, transformers_lives.bench, (), "test")])
    write(tmp_path / "results.jsonl", [where, *records])
    return read(tmp_path / "results.jsonl")


def test_both_lives_are_compared_and_what_is_unknown_says_why(tmp_path: Path) -> None:
    found = timed("gpt_neox", tmp_path)
    comparison = compare(found)
    assert comparison.flops_ratio == 3
    assert comparison.conditions["architecture"] == "GPTNeoXForCausalLM"
    assert comparison.conditions["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "gpt_neox").parameters()
    )
    unknown = {(row.quantity, row.phase) for row in found.rows if row.provenance == "unavailable"}
    assert {("bytes", "prefill"), ("bytes", "decode"), ("memory", "step")} <= unknown
    assert {row.convention for row in found.rows if row.quantity == "flops" and row.value is None} == {"causal"}
    assert all(row.reason for row in found.rows if row.value is None)
    assert max(row.setting("context") for row in found.rows if "context" in row.conditions) == 32


def test_an_architecture_that_cannot_be_counted_is_compared_without_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks_its_data(*_: Any) -> None:
        raise NotImplementedError("aten::nonzero\nand more")

    monkeypatch.setattr(transformers_lives, "count", asks_its_data)
    found = timed("opt", tmp_path)
    reasons = {row.reason for row in found.rows if row.quantity == "flops" and row.convention == "model"}
    assert reasons == {"not countable without data: aten::nonzero"}
    assert compare(found).flops_ratio is None
    assert "FLOPs" not in compare(found).headline
