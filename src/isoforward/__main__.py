"""The command `isoforward`: every script and question of this project, in a clone and outside one.

Each does what its file does when Python runs it. Installed, the files lie in the package, beside their configs.
"""

from __future__ import annotations

import ast
import io
import re
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path

MODULES = {  # as `python -m` runs them
    "report": ("isoforward.show.report", [], "Makes the report of one run or several again, from their results.jsonl."),
    "import": (
        "isoforward.formats.export",
        ["import"],
        "Turns a Transformers directory or a GGUF file into an export.",
    ),
}
COMMANDS = Path(__file__).parent / "commands"  # what a wheel has of train.py, generate.py and experiments/


def scripts() -> dict[str, Path]:
    root = Path(__file__).parents[2]
    folders = [COMMANDS] if COMMANDS.is_dir() else [root, root / "experiments"]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}


def usage() -> str:
    asked = {name: first_line(path) for name, path in scripts().items()} | {
        name: about for name, (_, _, about) in MODULES.items()
    }
    first = ("train", "generate", "report", "import")
    ordered = [*first, *sorted(asked.keys() - set(first))]
    width = max(map(len, ordered))
    return "\n".join(
        [
            "usage: isoforward COMMAND [key=value ...]      isoforward COMMAND --help for its keys",
            "",
            *(f"  {name:{width}}  {asked[name]}" for name in ordered),
        ]
    )


def first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = text.partition("\n\n")[0].replace("\n", " ")
    return line.partition(": python ")[0]


def as_typed_here(text: str) -> str:
    """Examples of a help text name files of a clone."""
    text = re.sub(r"python (?:experiments/)?(\w+)\.py", r"isoforward \1", text)
    return text.replace("python -m isoforward.show.report", "isoforward report")


def main(arguments: Sequence[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h"):
        print(usage())
        return 0
    if command in MODULES:
        module, before, _ = MODULES[command]
        sys.argv = [command, *before, *rest]
        runpy.run_module(module, run_name="__main__")
        return 0
    known = scripts()
    if command not in known:
        near = get_close_matches(command, [*known, *MODULES], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"error: {command} is not a command: {hint}isoforward --help lists them", file=sys.stderr)
        return 2
    path = known[command]
    sys.argv = [str(path), *rest]
    sys.path.insert(0, str(path.parent))  # as for any script: processes of its own cases find it by name
    if "--help" not in rest:
        runpy.run_path(str(path), run_name="__main__")
        return 0
    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        print(as_typed_here(shown.getvalue()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
