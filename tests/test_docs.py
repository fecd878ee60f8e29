"""The site: made from docs/ and the docstrings, without a warning and without a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import isoforward

ROOT = Path(__file__).parents[1]


def test_the_site_is_made_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    for name in ("app.any_module.compare_phases", "model.steps.train_step", "serve.inference.InferenceModule.generate"):
        assert f'id="isoforward.{name}"' in reference
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', reference)
    assert not fetched


def test_the_reference_and_the_page_on_python_have_every_public_name() -> None:
    python, reference = (ROOT / "docs" / "python.md").read_text(), (ROOT / "docs" / "reference.md").read_text()
    for name in isoforward.__all__:
        assert f"`{name}`" in python
        assert re.search(rf"^::: isoforward\.[\w.]+\.{name}$", reference, re.M)
