"""What page.py writes: one file within its limit, without a request, in every language, answered by rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from isoforward.app.train import lesson_of
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, read
from isoforward.lesson import page as pages
from isoforward.lesson.page import LIMIT, SCRIPTS, build_page, main, write_lesson
from isoforward.serve.inference import load

from .conftest import make_export
from .test_numbers import RECORDED, data_of

HERE = Path(pages.__file__).parent

TEXT = json.loads((HERE / "text.json").read_text("utf-8"))
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='hacked=1'>\u202e{{ script }}\u2028"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("page") / "export", family="gpt2", layers=1, heads=2, width=16)


@pytest.fixture(scope="module")
def recorded() -> Results:
    return read(RECORDED / "phase_costs" / "results.jsonl")


def test_the_code_of_the_page_stays_short() -> None:
    files = [*HERE.rglob("*.js"), *HERE.rglob("*.css"), *HERE.rglob("*.html")]
    assert sum(len(path.read_text("utf-8").splitlines()) for path in files) < 2500
    assert {str(path.relative_to(HERE)) for path in HERE.rglob("*.js")} == set(SCRIPTS)


def test_every_text_is_in_every_language_and_every_text_is_used() -> None:
    languages = TEXT["language"].keys()
    code = "".join((HERE / path).read_text("utf-8") for path in SCRIPTS)
    written = re.findall(r"`([\w.]*\$\{[^`]*)`", code)
    templates = [re.compile(r"[\w.]+".join(map(re.escape, re.split(r"\$\{[^}]*\}", each)))) for each in written]
    for key, texts in TEXT.items():
        assert texts.keys() == languages, key
        places = [set(re.findall(r"\{(\w+)\}", text)) for text in texts.values()]
        assert all(place == places[0] for place in places), key
        assert f'"{key}"' in code or any(template.fullmatch(key) for template in templates), key
    for key in re.findall(r"""\b(?:t\(|field\(|button\(|say\("\w+", )"([\w.]+)\"""", code):
        assert key in TEXT, key


def test_a_page_asks_for_nothing_and_runs_only_its_own_script(export: Path, tmp_path: Path) -> None:
    html = write_lesson(export, tmp_path / "lesson.html").read_text("utf-8")
    assert len(html.encode()) < LIMIT
    assert "default-src 'none'" in html
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["']?(?!data:,|#)[^"'`{\s>]+""", re.sub(r"<script.*?</script>", "", html, flags=re.S)
    )
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|importScripts|sendBeacon)\b", html)


def test_text_with_markup_stays_text(export: Path, recorded: Results) -> None:
    doubtful = replace(
        recorded, verdicts=tuple(replace(v, reasons=(HOSTILE,), trusted=False) for v in recorded.verdicts)
    )
    html = build_page(load(export), doubtful, name=HOSTILE)
    assert html.count("<script") == 2
    assert data_of(html)["name"] == HOSTILE
    assert HOSTILE in data_of(html)["measured"]["doubts"]


def test_a_model_too_large_for_a_page_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = make_export(tmp_path / "large", family="gpt2", layers=2, heads=2, width=640)
    with pytest.raises(BadInput, match=r"2\.5 MB at most: train a smaller model, such as model=tiny"):
        write_lesson(large)
    assert main([str(large)]) == 2
    assert "a page is 2.5 MB at most" in capsys.readouterr().err
    assert not (large / "lesson.html").exists()
    small = make_export(tmp_path / "small", family="gpt2", layers=1, heads=2, width=64)
    page = build_page(load(small), None, name="small")
    assert data_of(page)["model"]["bits"] == 16
    monkeypatch.setattr(pages, "LIMIT", len(page.encode()) - 1)
    assert data_of(build_page(load(small), None, name="small"))["model"]["bits"] == 8
    monkeypatch.setattr(pages, "LIMIT", 60_000)
    with pytest.raises(BadInput, match="smaller model"):
        build_page(load(small), None, name="small")


def test_a_weights_file_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(BadInput, match="smaller model"):
        write_lesson(tmp_path)


def test_training_says_where_the_lesson_is_or_why_there_is_none(tmp_path: Path) -> None:
    make_export(tmp_path / "small" / "export", family="gpt2", layers=1, heads=2, width=16)
    assert lesson_of(tmp_path / "small") == f"lesson   {tmp_path / 'small' / 'lesson.html'}"
    assert (tmp_path / "small" / "lesson.html").is_file()
    make_export(tmp_path / "large" / "export", family="gpt2", layers=2, heads=2, width=640)
    assert lesson_of(tmp_path / "large").startswith("lesson   none: the lesson would take")
