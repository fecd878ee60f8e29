"""The gallery holds every question, with its answer and picture, as the recorded rows give them."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from isoforward.app.scripts import SCRIPTS, read_script, scripts
from isoforward.base.results import read

ROOT = Path(__file__).parents[1]

specification = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
assert specification is not None and specification.loader is not None
gallery = importlib.util.module_from_spec(specification)
specification.loader.exec_module(gallery)
PAGE = gallery.PAGE.read_text("utf-8")
RECORDED = {path.name: read(path / "results.jsonl") for path in sorted(gallery.RECORDED.iterdir())}


def test_every_question_is_recorded() -> None:
    asked = {row.experiment for results in RECORDED.values() for row in results.rows}
    assert set(scripts()) - set(SCRIPTS) - asked == set()


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_run_is_on_the_page_with_its_answer_picture_and_command(name: str) -> None:
    results = RECORDED[name]
    said = " ".join(PAGE.split())
    assert " ".join((gallery.RECORDED / name / "answer.txt").read_text("utf-8").split()) in said
    assert read_script(scripts()[results.rows[0].experiment]).about in said
    assert next(iter(results.environments.values())).command in said
    assert f"../docs/pictures/{name}.svg" in PAGE
    assert (gallery.PICTURES / f"{name}.svg").read_text("utf-8").count("<text") > 5


def test_every_recorded_run_can_be_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    recorder = importlib.import_module("record")
    elsewhere = {
        "phase_costs_h200",
        "phase_costs_smollm2",
        "mismatch_llama",
        "mismatch_vllm",
        "serving",
        "serving_llama",
    }  # other machines, weights, servers
    assert recorder.QUESTIONS.keys() >= RECORDED.keys() - elsewhere
    for script, *overrides in recorder.QUESTIONS.values():
        assert scripts().keys() >= {script}
        assert all("=" in override for override in overrides)


def test_the_page_is_what_the_recorded_rows_make() -> None:
    assert gallery.page(RECORDED) == PAGE


@pytest.mark.parametrize("path", gallery.TABLES, ids=lambda path: path.name)
def test_the_tables_of_questions_are_those_of_their_files(path: Path) -> None:
    text = path.read_text("utf-8")
    assert gallery.with_table(text, "questions", gallery.table()) == text
    assert gallery.table() in text


def test_the_table_of_ways_of_serving_is_that_of_the_recorded_rows() -> None:
    text, table = gallery.MISMATCH.read_text("utf-8"), gallery.ways_table(RECORDED)
    assert table in text
    assert gallery.with_table(text, "ways", table) == text
    assert "| cached decode, exact, batch 1 | 0 | 0 | 1.000 to 1.000 |" in table


def test_the_pictures_of_the_repository_are_small() -> None:
    assert sum(path.stat().st_size for path in gallery.PICTURES.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_recorded_names_a_place_of_its_machine(name: str) -> None:
    for path in (gallery.RECORDED / name).iterdir():
        assert not re.search(r"""[\s="']/\w+/""", path.read_text("utf-8"))
