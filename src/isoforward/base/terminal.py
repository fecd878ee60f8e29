"""Lines for people, as they are: paths and file names are no markup."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
