"""`generate.py explain=html`: one generation as a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from isoforward.app.generate import generate
from isoforward.base.config import GenerateConfig
from isoforward.base.errors import BadInput
from tests.lesson.conftest import make_export
from tests.lesson.test_numbers import data_of


def test_a_generation_becomes_a_page_of_its_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = make_export(tmp_path / "run" / "export", family="llama", layers=1, heads=2, width=16)
    monkeypatch.chdir(tmp_path)
    asked = {"checkpoint": str(export), "prompt": "To be", "max_new_tokens": 5, "temperature": 0.0}
    generate(GenerateConfig(explain="html", **asked))  # type: ignore[arg-type]
    told = capsys.readouterr()
    assert "generation.html" in told.err
    assert told.out.startswith("To be")
    data = data_of((tmp_path / "generation.html").read_text("utf-8"))
    assert data["prompt"] == data["generation"]["prompt"] == "To be"
    tokens = data["generation"]["tokens"]
    assert [each["pass"] for each in tokens] == [1, 2, 3, 4, 5]
    assert all(each["chosen"] == each["top"][0][0] and len(each["top"]) == 5 for each in tokens)
    assert all(each["time_s"] > 0 for each in tokens)
    assert [each["context"] for each in tokens] == list(range(tokens[0]["context"], tokens[0]["context"] + 5))


def test_what_explains_nothing_as_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="leave out prompts_file="):
        GenerateConfig(explain="html", prompts_file="prompts.txt")
    with pytest.raises(BadInput, match="explain=htm is not known: did you mean html"):
        GenerateConfig(explain="htm")
    large = make_export(tmp_path / "large", family="gpt2", layers=2, heads=2, width=640)
    with pytest.raises(BadInput, match="smaller model"):
        generate(GenerateConfig(explain="html", checkpoint=str(large), prompt="To be"))
