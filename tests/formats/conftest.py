from pathlib import Path

import pytest

from isoforward.formats.export import export
from tests.formats.exports import trained


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export(trained(), tmp_path / "export", tokenizer=None)
