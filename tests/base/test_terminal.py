"""Lines that hold paths come out as they are."""

import io

from rich.console import Console

from isoforward.base.terminal import say


def test_a_path_is_neither_markup_nor_cut_into_lines() -> None:
    line = "everything goes to runs/[bold]2026[/bold]/" + "x" * 200
    written = io.StringIO()
    say(Console(file=written, width=40, force_terminal=True), line)
    assert written.getvalue() == f"{line}\n"
