"""What was typed, for Hydra: a value that is text means what it says, and is no grammar.

In one run that holds for all of it: `prompt="Yes," he said`. In a sweep commas separate values, but for those in quotes
or brackets and, in a prompt, those before a space or at the end. Quotes around a whole value are taken off a prompt
where they kept a comma from separating, and off anything else always, as people who know Hydra write them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from isoforward.base.errors import BadInput

PROSE = ("prompt", "stop", "sample_prompt")
PATHS = ["checkpoint", "draft", "prompts_file", "run_dir", "hardware", "model.path", "trainer.resume"]
PATHS += ["data.path", "data.tokenizer", "data.cache_dir"]
MISSING = "???"
SWEEPS = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)  # of Hydra's grammar
PLAIN = re.compile(r"[A-Za-z_./][\w./:-]*", re.ASCII)
OTHERS = ("true", "false", "nan", "inf")  # what would not be a string to Hydra


def text_keys(schema: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for field in fields(schema):
        if is_dataclass(hints[field.name]):
            yield from text_keys(hints[field.name], f"{field.name}.")
        elif hints[field.name] in (str, str | None):
            yield prefix + field.name


def as_text(argument: str, schema: type, *, sweep: bool = False) -> str:
    """`argument` (key=value) as Hydra has to be given it, so that the config holds what was typed."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or name not in text_keys(schema) or value == "null":
        return argument
    if value.strip("'\"") == MISSING:
        raise BadInput(f"{name}={MISSING} means a missing value to Hydra; write it with a space behind, or other text")
    prose = name in PROSE
    if not prose and "${" in value:
        return f"{key}={at_home(name, value)}"
    if not sweep:
        return f"{key}={quoted(at_home(name, value if prose else unquoted(value)))}"
    if SWEEPS.fullmatch(value):
        return argument
    values = [part if prose and not protects(part) else unquoted(part) for part in separate(value, prose=prose)]
    values = [at_home(name, part) for part in values]
    return f"{key}=" + ",".join(part if is_plain(part) else quoted(part) for part in values)


def separate(text: str, *, prose: bool) -> Iterator[str]:
    start = depth = 0
    quote = ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not text[start:i][-1:].isalnum() and character in text[i + 1 :]:  # no apostrophe
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character == "," and not depth and not (prose and not text[i + 1 : i + 2].strip()):
            yield text[start:i] if prose else text[start:i].strip()
            start = i + 1
    yield text[start:] if prose else text[start:].strip()


def protects(value: str) -> bool:
    return len(list(separate(unquoted(value), prose=True))) > 1


def unquoted(value: str) -> str:
    """Without quotes around the whole of it."""
    whole = len(value) > 1 and value[0] == value[-1] in "'\"" and value[0] not in value[1:-1]
    return value[1:-1] if whole else value


def at_home(name: str, value: str) -> str:
    """Not every shell expands a tilde after an equals sign."""
    return os.path.expanduser(value) if name in PATHS and value.startswith("~") else value  # noqa: PTH111


def is_plain(value: str) -> bool:
    """Needs no quotes, which would show where a sweep's cases are named; null is Hydra's here, too."""
    return PLAIN.fullmatch(value) is not None and value.lower() not in OTHERS


def quoted(text: str) -> str:
    """In Hydra's quotes, and without OmegaConf's interpolations."""
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text) + '"'
