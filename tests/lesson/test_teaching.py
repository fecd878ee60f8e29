"""The pages for a class: exercises whose answers are run, a notebook that runs, a page whose numbers are recorded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from isoforward.base.results import read

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_exercises_print_the_answers_that_are_given() -> None:
    page = (DOCS / "teachers.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.S)
    assert len(blocks) == len(re.findall(r"^\*\*\d\.", page, re.M)) == 8
    namespace: dict[str, Any] = {}
    for code, answer in blocks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, "teachers.md", "exec"), namespace)
        assert said.getvalue() == answer, code


def test_the_notebook_runs_and_uses_the_python_api_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((DOCS / "both_lives.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(line.lstrip().startswith(("!", "%")) for cell in cells for line in cell.splitlines())
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, "both_lives.ipynb", "exec"), namespace)
    said = capsys.readouterr().out
    assert "957,184 weights" in said
    assert re.search(r"guessed 3\.00, measured \d", said)
    assert "make train" in said


def test_the_page_on_inference_has_the_numbers_of_the_recorded_run_in_both_languages() -> None:
    specification = importlib.util.spec_from_file_location("forward_pages", DOCS / "forward_pages.py")
    assert specification is not None and specification.loader is not None
    pages = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(pages)
    results = read(pages.RECORDED)
    for name in pages.PAGES:
        made = pages.page(name, results)
        assert (DOCS / name).read_text("utf-8") == made, f"{name} is not current: python docs/forward_pages.py"
        template = (DOCS / f"{name}.in").read_text("utf-8")
        assert not re.search(r"\d\s?(?:ms|µs|s|MiB|GFLOP|x)\b", template), "a number that was typed"
    english, chinese = (re.findall(r"\$(\w+)", (DOCS / f"{name}.in").read_text("utf-8")) for name in pages.PAGES)
    assert {name.removesuffix("_zh") for name in chinese} == set(english)
