"""The command `isoforward`: every script and question of this project, in a clone and outside one.

Each does what its file does when Python runs it. Installed, the files lie in the package, beside their configs.
"""

from __future__ import annotations

import io
import re
import runpy
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import version
from textwrap import fill

from isoforward.app.scripts import SCRIPTS, questions, read_script, scripts
from isoforward.base.errors import did_you_mean
from isoforward.base.terminal import print_what_can_be_encoded

MODULES = {  # as `python -m` runs them
    "attach": (
        "isoforward.attach.script",
        [],
        "Runs a training script of yours unchanged, and says what each phase of its steps costs.",
    ),
    "judge": ("isoforward.app.judge", [], "Says whether one of two commands, or runs, is faster, equal or undecided."),
    "lesson": ("isoforward.lesson.page", [], "Makes the lesson of a run: both lives of its model, in one page."),
    "report": ("isoforward.show.report", [], "Makes the report of one run or several again, from their results.jsonl."),
    "import": ("isoforward.app.convert", ["import"], "Turns a Transformers directory or a GGUF file into an export."),
    "gguf": ("isoforward.app.convert", ["gguf"], "Writes an export as a GGUF file, for llama.cpp."),
}


def usage() -> str:
    found = scripts()
    chapters = {
        "": {name: read_script(found[name]).about for name in SCRIPTS}
        | {name: about for name, (_, _, about) in MODULES.items()}
    }
    for question in questions():
        chapters.setdefault(question.chapter, {})[question.name] = question.about
    width = max(len(name) for commands in chapters.values() for name in commands)
    lines = ["usage: isoforward COMMAND [key=value ...]", "       isoforward COMMAND --help for its keys"]
    hang = " " * (width + 4)
    for chapter, commands in chapters.items():
        named = commands.items()
        lines += [
            "",
            *([chapter] if chapter else []),
            *(
                fill(f"{name:{width}}  {about}", 80, initial_indent="  ", subsequent_indent=hang)
                for name, about in named
            ),
        ]
    return "\n".join(lines)


def as_typed_here(text: str) -> str:
    """Examples of a help text name files of a clone."""
    text = re.sub(r"python (?:experiments/)?(\w+)\.py", r"isoforward \1", text)
    return text.replace("python -m isoforward report", "isoforward report")


def main(arguments: Sequence[str] | None = None) -> int:
    print_what_can_be_encoded()
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--version", "version"):
        print(f"isoforward {version('isoforward')}")
        return 0
    if command in ("--help", "-h", "help"):
        print(usage())
        return 0
    if command in MODULES:
        module, before, _ = MODULES[command]
        sys.argv = [command, *before, *rest]
        runpy.run_module(module, run_name="__main__")
        return 0
    known = scripts()
    if command not in known:
        hint = did_you_mean(command, [*known, *MODULES])
        print(f"error: {command} is not a command: {hint}isoforward --help lists them", file=sys.stderr)
        return 2
    path = known[command]
    sys.argv = [str(path), *rest]
    sys.path.insert(0, str(path.parent))  # as for any script: processes of its own cases find it by name
    shown = io.StringIO()
    try:
        with redirect_stdout(shown) if "--help" in rest else nullcontext():
            runpy.run_path(str(path), run_name="__main__")
    except KeyboardInterrupt:  # while libraries load
        print("error: stopped by Ctrl-C before it began", file=sys.stderr)
        return 130
    finally:
        print(as_typed_here(shown.getvalue()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
