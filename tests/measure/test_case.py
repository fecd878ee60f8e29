"""Labels are pure functions of a case, and what is built from it is the same in every process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isoforward.base.config import MeasureConfig, ModelConfig, OptimConfig
from isoforward.measure.case import Case, batch_of, differing_logits, frozen_of, identity_row, master_of
from isoforward.model import cost
from isoforward.model.gpt import GPT

MODEL = ModelConfig(layers=1, heads=2, width=16, context=64, vocab=32)
CASE = Case(experiment="x", model=MODEL, batch=2, length=16)


def test_prompt_and_new_tokens_stay_within_the_models_context() -> None:
    case = replace(CASE, measure=MeasureConfig(prompt=1000, new_tokens=1000))
    assert (case.prompt, case.new_tokens) == (62, 2)


@pytest.mark.parametrize(
    ("context", "measured", "found"), [(64, 4096, [16, 32, 64]), (4096, 100, [25, 50, 100]), (8, 8, [8])]
)
def test_the_cache_curve_goes_up_to_the_context_by_doublings(context: int, measured: int, found: list[int]) -> None:
    case = replace(CASE, model=replace(MODEL, context=context), measure=MeasureConfig(context=measured))
    assert case.contexts == found


def test_conditions_say_what_is_not_usual_and_labels_come_last() -> None:
    usual = CASE.conditions()
    assert usual["parameters"] == cost.parameters(MODEL).total
    assert not usual.keys() & {"checkpointing", "compile", "adapter"}
    other = replace(CASE, compile=True, checkpointing="full", labels={"family": "mine"}).conditions(batch=3)
    assert other == usual | {"compile": True, "checkpointing": "full", "family": "mine", "batch": 3}
    assert CASE.training()["tokens"] == 32


def test_sgd_goes_by_the_rule_that_its_momentum_makes_it() -> None:
    assert replace(CASE, optim=OptimConfig(name="sgd", momentum=0.9)).rule == "momentum"
    assert replace(CASE, optim=OptimConfig(name="sgd", momentum=0.0)).rule == "sgd"


def test_the_same_case_has_the_same_weights_and_the_same_batch() -> None:
    one, two = master_of(CASE), master_of(CASE)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    tokens, targets = batch_of(CASE)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, batch_of(CASE)[0])
    assert not torch.equal(tokens, batch_of(replace(CASE, seed=1))[0])


def test_identity_counts_the_logits_that_differ() -> None:
    master, tokens = master_of(CASE), batch_of(CASE)[0][:1]
    frozen: GPT = frozen_of(CASE, master)
    row = identity_row(CASE, master, frozen, tokens)
    assert (row.value, row.conditions["logits"]) == (0, 16 * 32)
    with torch.no_grad():
        frozen.unembedding.weight[5] += 1  # the logits of one token
    assert differing_logits(master, frozen, tokens) >= 16
    assert master.training
