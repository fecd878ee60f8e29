"""The gallery holds every question, with its answer and picture, as the recorded rows give them."""

import importlib.util
import re
from pathlib import Path

import pytest

from isoforward.base.results import read

ROOT = Path(__file__).parents[1]
QUESTIONS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))

specification = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
assert specification is not None and specification.loader is not None
gallery = importlib.util.module_from_spec(specification)
specification.loader.exec_module(gallery)
PAGE = gallery.PAGE.read_text("utf-8")
RECORDED = sorted(path.name for path in gallery.RECORDED.iterdir())


def test_every_question_is_recorded():
    asked = {row.experiment for name in RECORDED for row in read(gallery.RECORDED / name / "results.jsonl").rows}
    assert set(QUESTIONS) - asked == set()


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_run_is_on_the_page_with_its_answer_picture_and_command(name):
    results = read(gallery.RECORDED / name / "results.jsonl")
    said = " ".join(PAGE.split())
    assert " ".join((gallery.RECORDED / name / "answer.txt").read_text("utf-8").split()) in said
    assert gallery.question(results.rows[0].experiment) in said
    assert next(iter(results.environments.values())).command in said
    assert f"../docs/pictures/{name}.png" in PAGE
    assert (gallery.PICTURES / f"{name}.png").stat().st_size > 10_000


def test_the_page_is_what_the_recorded_rows_make(monkeypatch):
    monkeypatch.setattr(gallery, "picture", lambda name, results: gallery.PICTURES / f"{name}.png")
    assert gallery.page() == PAGE


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_recorded_names_a_place_of_its_machine(name):
    for path in (gallery.RECORDED / name).iterdir():
        assert not re.search(r"""[\s="']/\w+/""", path.read_text("utf-8"))
