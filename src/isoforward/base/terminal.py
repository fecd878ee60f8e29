"""Lines for people, on whatever terminal they have."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, line: str) -> None:
    """As it is: paths and file names are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_what_can_be_encoded() -> None:
    """Characters that the encoding of stdout lacks become question marks, here and in processes started from here."""
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:replace"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
