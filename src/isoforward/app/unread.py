"""Keys that a command has with its config's groups, but does not read: never, or not beside another that was typed.

Questions share the groups of training's config; each names in its docstring what it leaves of them. Which keys the code
of a command can reach is found by the test, which fails where one of the others is not named. What depends on another
key is in `base.dependent_keys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from isoforward.app.scripts import conf_directory, options_of, read_script
from isoforward.base import dependent_keys
from isoforward.base.checks import unknown
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput

READS_TEXT = ("precision",)  # questions; all others measure on random tokens, or on a text of their own


def unread(script: Path, schema: type) -> set[str]:
    of_all = {"measure.enabled"} if issubclass(schema, ExperimentConfig) else set()
    return of_all | read_script(script).unread


def set_by(group: str, option: str) -> set[str]:
    """The keys that choosing `group=option` sets; none where that is no choice of a group."""
    if option not in options_of(group):
        return set()
    stored = OmegaConf.load(conf_directory() / group / f"{option}.yaml")
    return {f"{group}." + str(key) for key in stored if key != "defaults"}


def refuse_what_is_not_read(script: Path, schema: type, config: DictConfig, overrides: Sequence[str]) -> None:
    """A key that changes nothing would make its user believe that it did.

    `config` is what the overrides were composed to, not yet checked: what has no effect can be out of range, too.
    """
    command, silent = script.stem, unread(script, schema)
    reads_text = command in READS_TEXT or not issubclass(schema, ExperimentConfig)
    values = dependent_keys.flat(OmegaConf.to_container(config, resolve=True))
    off = dependent_keys.unread(values)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if value == "schema" and (options := options_of(key)):  # what the options of a group begin from is none of them
            raise unknown(key, value, options)
        text = key.startswith("data.") and key not in ("data.batch", "data.length", "data.source")
        if not reads_text and (text or (key in ("data", "data.source") and value != "synthetic")):
            raise BadInput(f"{override}: {command} reads no text, it measures on random tokens; leave this key out")
        sets = set_by(key, value)
        if key in silent or (sets and sets <= silent):
            raise BadInput(f"{override}: {command} does not read {key}, so it would change nothing; leave this key out")
        name = next(iter(sets)) if sets and sets <= off.keys() else dependent_keys.within(key, off)
        if name is not None:
            shown = f"{key}={value}" if sets else key
            raise BadInput(off[name].refusal(shown, dependent_keys.value_of(values, off[name].on)))
