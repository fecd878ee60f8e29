"""The README.md of an export: what the weights are, how to open them, and what the run measured of them.

For people alone: nothing reads it, so that the manifest does not vouch for it and anybody may add to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoforward import units
from isoforward.config import ModelConfig

if TYPE_CHECKING:  # what writes weights never imports what measures them
    from isoforward.compare import Comparison, Line

CARD = "README.md"
FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [isoforward, {family}]
---
"""
OPEN = """
## Open it

```python
from isoforward import load
print(load("DIRECTORY").generate("ROMEO:"))

from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""


def write_card(directory: Path, sections: Sequence[str]) -> None:
    (directory / CARD).write_text("\n".join(sections), encoding="utf-8")


def about_weights(model: ModelConfig, *, parameters: int, dtype: str, fingerprint: str) -> str:
    kind = "GPT-2" if model.family == "gpt2" else "Llama"
    heads = f"{model.heads} heads" + (
        f" on {model.kv_heads} of keys" if model.kv_heads not in (None, model.heads) else ""
    )
    return (
        f"{FRONT.format(family=model.family)}\n# A {kind} of {parameters:,} parameters, in {dtype}\n\n"
        f"{model.layers} layers, {heads}, width {model.width}, context {model.context}, {model.vocabulary:,} tokens"
        f"{', embeddings tied' if model.tied else ''}. Weights `{fingerprint[:16]}`, as isoforward wrote them.\n{OPEN}"
    )


def about_training(facts: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    return "\n".join(["## How it was trained", "", *lines, ""])


def about_costs(comparison: Comparison, where: Mapping[str, Any]) -> str:
    """Numbers of the run that wrote the export, with what they hold for and whether they can be believed."""
    lines = [*comparison.training, comparison.step, *comparison.inference]
    of, doubts = comparison.conditions, "; ".join(comparison.warnings)
    return "\n".join(
        [
            "## What both its lives cost",
            "",
            comparison.headline,
            "",
            "| life | phase | time | a token | FLOP | peak memory |",
            "|---|---|---:|---:|---:|---:|",
            *(f"| {' | '.join(cells(line))} |" for line in lines),
            "",
            f"Measured on {where.get('gpu') or where.get('cpu')}, {where.get('threads')} threads, "
            f"torch {where.get('torch')}, in {of['dtype']}: training on {of['batch']} x {of['length']} tokens, "
            "serving one sequence. "
            + (f"Take these numbers with care: {doubts}." if doubts else "The run found no reason to doubt them."),
            "",
        ]
    )


def cells(line: Line) -> list[str]:
    return [
        line.life,
        line.label,
        "" if line.time is None or line.time.value is None else units.seconds(line.time.value),
        "" if line.time_per_token_s is None else units.seconds(line.time_per_token_s),
        "" if line.flops is None or not line.flops.value else units.count(line.flops.value),
        "" if line.memory is None or line.memory.value is None else units.size(line.memory.value),
    ]


def about_text(prompt: str, sample: str) -> str:
    quoted = sample.replace("```", "~~~")
    return f"## What it says\n\n```text\n{quoted}\n```\n\nFrom the prompt `{prompt}`, sampled once.\n"
