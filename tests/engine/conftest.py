"""One small training, whose export every engine serves."""

import subprocess
import sys
from pathlib import Path

import pytest

from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.loading import load_tokenizer
from tests.engine.servers import ROOT


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "train"
    keys = ["precision=fp32", "trainer.max_steps=40", "measure.enabled=false", "tracking=none", f"run_dir={run}"]
    subprocess.run([sys.executable, ROOT / "train.py", *keys], cwd=ROOT, check=True, capture_output=True)
    return run


@pytest.fixture(scope="session")
def tokenizer(trained: Path) -> Tokenizer:
    return load_tokenizer(trained / "export")
