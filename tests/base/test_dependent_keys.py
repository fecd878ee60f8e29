"""Every row of the table: a key is refused where it is not read, and taken where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from isoforward.base.config import ExperimentConfig, GenerateConfig, OptimConfig, TrainConfig
from isoforward.base.dependent_keys import RULES, SET, Rule, flat, typed, unread
from isoforward.model.gpt import GPT
from isoforward.model.optim import build, learning_rate
from tests.conftest import tiny

VALUES: dict[str, tuple[object, ...]] = {  # that the key can have, as base/config.py lists them
    "adapter.name": ("none", "lora", "frozen"),
    "checkpoint": (None, "runs/latest"),
    "data.source": ("shakespeare", "text", "hub", "synthetic"),
    "data.tokenizer": ("bpe", "char", "gpt2", "some/directory"),
    "draft": (None, "runs/small"),
    "logprobs": (False, True),
    "measure.enabled": (True, False),
    "measure.repeats": (None, 5),
    "model.positions": ("rope", "learned"),
    "model.source": ("fresh", "hf", "transformers"),
    "optim.name": ("adamw", "adam", "sgd", "muon"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "prompts_file": (None, "prompts.txt"),
    "temperature": (0.8, 0.0),
    "tracking.mode": ("auto", "wandb", "none"),
}
READ: dict[str, Any] = {  # everything that depends on another key is read, but model.path and draft_tokens
    "checkpoint": None,
    "data.source": "text",
    "model.positions": "rope",
    "optim.name": "muon",
    "adapter.name": "lora",
}
DEFAULTS = {
    key: value
    for schema in (TrainConfig, ExperimentConfig, GenerateConfig)
    for key, value in flat(dataclasses.asdict(schema())).items()
}


def cases() -> Iterator[tuple[str, Rule, object]]:
    return ((key, rule, value) for rule in RULES for value in VALUES[rule.on] for key in rule.keys.split())


@pytest.mark.parametrize(("key", "rule", "value"), list(cases()))
def test_a_key_is_refused_where_the_table_says_so_and_taken_elsewhere(key: str, rule: Rule, value: object) -> None:
    assert (key in DEFAULTS or key == "draft") and rule.on in DEFAULTS
    source = "hf" if key == "model.path" else "fresh"
    first = "hub" if key == "data.name" else "text"
    values = {**DEFAULTS, **READ, "model.source": source, "data.source": first, rule.on: value}
    among = value in (rule.read or rule.unread) or (value is not None and SET in (rule.read or rule.unread))
    read = among if rule.read else not among
    assert (key not in unread(values)) == read
    if not read:
        told = rule.refusal(key, value)
        assert told.startswith(f"{key} is ") and typed(rule.on, "").rstrip("=") in told


def test_every_row_has_a_case_of_either_kind() -> None:
    for rule in RULES:
        assert {rule.holds(value) for value in VALUES[rule.on]} == {True, False}, rule


@pytest.mark.parametrize("name", VALUES["optim.name"])
@pytest.mark.parametrize("key", ["beta1", "beta2", "momentum", "muon_lr", "lr", "weight_decay"])
def test_the_table_says_of_optimizers_what_they_do(key: str, name: Any) -> None:
    def settings(config: OptimConfig) -> list[dict[str, object]]:
        return [{**group, "params": None} for group in build(GPT(tiny()), config).param_groups]

    usual = OptimConfig(name=name)
    changed: dict[str, Any] = {key: 0.77}
    other = dataclasses.replace(usual, **changed)
    changes = settings(usual) != settings(other)
    assert changes == (f"optim.{key}" not in unread(flat({"optim": dataclasses.asdict(usual)})))


@pytest.mark.parametrize("kind", VALUES["optim.schedule"])
def test_the_table_says_of_schedules_what_they_do(kind: Any) -> None:
    ends = [learning_rate(99, OptimConfig(schedule=kind, min_lr=least), 100) for least in (0.1, 0.5)]
    off = unread(flat({"optim": dataclasses.asdict(OptimConfig(schedule=kind))}))
    assert (ends[0] != ends[1]) == ("optim.min_lr" not in off)


def test_the_family_says_which_positions_there_are() -> None:
    values = {"model.family": "gpt2", "model.positions": None}
    assert "model.rope_theta" in unread(values)
    assert "model.rope_theta" not in unread({**values, "model.family": "llama"})
    assert "model.rope_theta" not in unread({**values, "model.positions": "rope"})
