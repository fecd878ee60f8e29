"""The files that are commands: train.py, generate.py, and the questions of experiments/.

A question is one file. Its name is the command's; its docstring begins with the question, goes on with the help text,
and ends with its chapter and the keys that it does not read. Everything that names the questions elsewhere is made from
these.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "commands"  # where a wheel has the scripts
CHAPTERS = ("Start here", "Training against inference", "Serving", "Training", "Planning", "Trust", "Others")
SCRIPTS = ("train", "generate")  # commands that ask no question


@dataclass(frozen=True, kw_only=True)
class Script:
    path: Path
    about: str  # one line: for a question, the question
    help: str  # the whole text
    chapter: str
    unread: frozenset[str]  # keys that its config has, and that change nothing

    @property
    def name(self) -> str:
        return self.path.stem


@cache  # a command asks for its help, and for what it does not read
def read_script(path: Path) -> Script:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
    chapter = re.search(r"^:chapter: (.+)$", docstring, re.M)
    unread = re.search(r"^:unread: (.+)\Z", docstring, re.M | re.S)
    return Script(
        path=path,
        about=" ".join(docstring.partition("\n\n")[0].split()),
        help=docstring[: chapter.start()].rstrip() if chapter else docstring,
        chapter=chapter[1] if chapter and chapter[1] in CHAPTERS else CHAPTERS[-1],
        unread=frozenset(unread[1].split() if unread else ()),
    )


def scripts() -> dict[str, Path]:
    """Every command that is a file, by name: in a clone, or in the installed package."""
    root = PACKAGE.parents[1]
    folders = [INSTALLED] if INSTALLED.is_dir() else [root, root / "experiments"]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}


def conf_directory() -> Path:
    """The YAML files that overrides select: beside the package in a clone, inside it when installed."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "conf"


def options_of(group: str) -> list[str]:
    """What `group=` takes; none where that is no group."""
    return sorted(path.stem for path in (conf_directory() / group).glob("*.yaml")) if group.isidentifier() else []


def questions() -> list[Script]:
    """By chapter, then by name."""
    found = [read_script(path) for name, path in scripts().items() if name not in SCRIPTS]
    return sorted(found, key=lambda script: (CHAPTERS.index(script.chapter), script.name))
