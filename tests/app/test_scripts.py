"""What a file says of itself."""

from pathlib import Path

import pytest

from isoforward.app.scripts import CHAPTERS, SCRIPTS, questions, read_script, scripts


def written(path: Path, docstring: str) -> Path:
    path.write_text(f'"""{docstring}"""\n\nraise SystemExit("it was run")\n')
    return path


def test_name_line_help_and_chapter_are_read_without_running_the_file(tmp_path: Path) -> None:
    script = read_script(written(tmp_path / "why.py", "Why?\n\n    python why.py\n\nBecause.\n\n:chapter: Trust\n"))
    assert (script.name, script.about, script.chapter) == ("why", "Why?", "Trust")
    assert script.help == "Why?\n\n    python why.py\n\nBecause."


@pytest.mark.parametrize("docstring", ["Why?", "Why?\n\n:chapter: Philosophy"])
def test_a_question_without_a_known_chapter_comes_last(docstring: str, tmp_path: Path) -> None:
    assert read_script(written(tmp_path / "why.py", docstring)).chapter == CHAPTERS[-1]


def test_a_question_over_two_lines_is_one_line_in_a_list(tmp_path: Path) -> None:
    assert read_script(written(tmp_path / "why.py", "Why\n    not?\n\nBecause.")).about == "Why not?"


def test_every_file_is_a_command_and_all_but_two_are_questions() -> None:
    assert set(SCRIPTS) < set(scripts())
    assert {question.name for question in questions()} == set(scripts()) - set(SCRIPTS)


def test_questions_are_in_the_order_of_their_chapters() -> None:
    chapters = [CHAPTERS.index(question.chapter) for question in questions()]
    assert chapters == sorted(chapters)
    assert questions()[0].name == "phase_costs"
