"""The README.md of an export: what the weights are and how to open them.

It is for people: no code reads it, so the manifest does not vouch for it and anybody may add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from isoforward.base.config import ModelConfig
from isoforward.formats.families import written_as

CARD = "README.md"
FRONT = """---
library_name: {library}
pipeline_tag: text-generation
tags: [isoforward, {family}]
---
"""
OPEN = """
## Open it

```python
from isoforward import load
print(load("DIRECTORY").generate("ROMEO:"))
{transformers}```
"""
TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
"""


class Said(TypedDict):
    """Of an export, by its manifest.json."""

    model: dict[str, object]
    dtype: str
    parameters: int
    fingerprint: str
    about: dict[str, object]


def write_card(directory: Path, sections: Sequence[str]) -> None:
    (directory / CARD).write_text("\n".join(sections), encoding="utf-8")


def about_weights(model: ModelConfig, said: Said) -> str:
    known = written_as(model) is not None
    front = FRONT.format(library="transformers" if known else "isoforward", family=model.family)
    heads = f"{model.heads} heads" + (
        f" on {model.kv_heads} of keys" if model.kv_heads not in (None, model.heads) else ""
    )
    return (
        f"{front}\n# {model.family}, {said['parameters']:,} parameters, in {said['dtype']}\n\n"
        f"{model.layers} layers, {heads}, width {model.width}, context {model.context}, {model.vocabulary:,} tokens"
        f"{', embeddings tied' if model.tied else ''}. "
        f"Weights `{said['fingerprint'][:16]}`, as isoforward wrote them.\n"
        f"{OPEN.format(transformers=TRANSFORMERS if known else '')}"
    )
