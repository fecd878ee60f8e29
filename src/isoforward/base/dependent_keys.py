"""Keys that are read only where another key has some value: a table, beside the config that it is of.

Recipes and presets may hold such keys all the same. `app.unread` refuses those that were typed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from isoforward.base.architecture import FAMILIES, Architecture
from isoforward.base.config import MeasureConfig, ModelConfig

SET = "..."  # any value but null
# In which the options of a group differ: group=option chooses them
CHOSEN_BY_GROUP = ("adapter.name", "data.source", "measure.enabled", "model.source", "optim.name", "tracking.mode")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The keys are read where `on` has one of the values `read`, or where it has none of `unread`."""

    keys: str  # with spaces between
    on: str
    read: tuple[object, ...] = ()
    unread: tuple[object, ...] = ()
    because: str = ""

    def holds(self, value: object) -> bool:
        """Whether the keys are read where `on` is `value`."""
        values = self.read or self.unread
        return (value in values or (SET in values and value is not None)) == bool(self.read)

    def refusal(self, key: str, value: object) -> str:
        """Of `key`, where `on` is `value`."""
        if self.read:
            ways = [typed(self.on, each) for each in self.read]
            return f"{key} is read with {' or '.join(ways)} alone; write {ways[0]} {key}=..."
        beside = typed(self.on, SET if SET in self.unread else value)
        return f"{key} is not read with {beside}{self.because}; leave one of them out"


def typed(key: str, value: object) -> str:
    if key == "measure.enabled":
        value = "default" if value else "none"
    shown = key.partition(".")[0] if key in CHOSEN_BY_GROUP else key
    return f"{shown}={str(value).lower() if isinstance(value, bool) else value}"


SIZES = " ".join(f"model.{field.name}" for field in fields(ModelConfig) if field.name not in ("source", "path"))
MEASURED = " ".join(f"measure.{field.name}" for field in fields(MeasureConfig) if field.name != "enabled")
RULES = (  # where several refuse a key, the last is told
    Rule(keys="data.path", on="data.source", read=("text",)),
    Rule(keys="data.name", on="data.source", read=("hub",)),
    Rule(keys="data.column data.validation", on="data.source", read=("text", "hub")),
    Rule(keys="data.vocab", on="data.tokenizer", read=("bpe",)),
    Rule(keys="data.tokenizer data.vocab", on="model.source", unread=("hf",), because=": the checkpoint decides"),
    Rule(keys="data.tokenizer data.vocab", on="checkpoint", unread=(SET,), because=": the checkpoint decides"),
    Rule(keys="model.path", on="model.source", read=("hf", "transformers")),
    Rule(keys="model.rope_theta model.rope_scaling", on="model.positions", read=("rope",)),
    Rule(keys=SIZES, on="model.source", unread=("hf", "transformers"), because=": the checkpoint decides"),
    Rule(keys=f"{SIZES} model.source model.path", on="checkpoint", unread=(SET,), because=": the checkpoint decides"),
    Rule(keys="optim.muon_lr", on="optim.name", read=("muon",)),
    Rule(keys="optim.momentum", on="optim.name", read=("sgd", "muon")),
    Rule(keys="optim.beta1 optim.beta2", on="optim.name", unread=("sgd",)),
    Rule(keys="optim.min_lr", on="optim.schedule", unread=("constant",)),
    Rule(keys="adapter.rank adapter.alpha adapter.base", on="adapter.name", read=("lora",)),
    Rule(keys="adapter.targets", on="adapter.name", read=("lora", "frozen")),
    Rule(keys="tracking.project tracking.entity tracking.group tracking.tags", on="tracking.mode", unread=("none",)),
    Rule(keys="measure.budget", on="measure.repeats", unread=(SET,)),
    Rule(keys=f"{MEASURED} hardware", on="measure.enabled", unread=(False,)),
    Rule(keys="draft_tokens", on="draft", read=(SET,)),
    Rule(keys="explain stream", on="prompts_file", unread=(SET,)),
    Rule(keys="stream", on="logprobs", unread=(True,)),
    Rule(keys="top_k top_p", on="temperature", unread=(0,)),
)


def unread(values: Mapping[str, object]) -> dict[str, Rule]:
    """The keys that are not read in this config (flat, by key as it is typed), and the rule that says so."""
    return {
        key: rule
        for rule in RULES
        if rule.on in values and not rule.holds(value_of(values, rule.on))
        for key in rule.keys.split()
    }


def value_of(values: Mapping[str, object], key: str) -> object:
    """With what the family says where `model.positions` does not."""
    if key == "model.positions" and values[key] is None:
        return FAMILIES.get(str(values["model.family"]), Architecture()).positions
    return values[key]


def within(key: str, keys: Mapping[str, object]) -> str | None:
    """The one of `keys` that `key` is, or is a part of: model.rope_scaling of model.rope_scaling.factor."""
    return next((each for each in keys if key == each or key.startswith(f"{each}.")), None)


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in flat(branch, f"{prefix}{name}.").items()}
