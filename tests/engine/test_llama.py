"""llama.cpp's server serves a GGUF of a training: our greedy text token for token, `mismatch` and `serving endpoint=`.

`make engine-llama` sets it up in .venv-llama; nothing else needs that.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isoforward.app.convert import main as write
from isoforward.base.results import only, read, select
from isoforward.data.tokenizer import Tokenizer
from tests.engine.servers import PROMPTS, ROOT, greedy_tokens, mismatch_of, started

PYTHON = ROOT / ".venv-llama" / "bin" / "python"
FP32 = "0"  # of ggml's types: its cache is in fp16 where nothing is said
TEXTS = [
    "ROMEO:\n",
    "It's  the king's 12 ships,\n\n\tand cafés — 世界 😀 don't ",
    " a  b   c\n \n",
    "\ufffd\u00a0x",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-llama: make engine-llama sets it up"),
]


@pytest.fixture(scope="module")
def gguf(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    assert write(["gguf", str(trained / "export"), str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def url(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [str(PYTHON), "-m", "llama_cpp.server", "--model", str(gguf), "--n_ctx", "0", "--logits_all", "true"]
    command += ["--type_k", FP32, "--type_v", FP32, "--interrupt_requests", "false"]
    with started(command, {}, "/v1/models", tmp_path_factory.mktemp("llama")) as url:
        yield url


def test_it_reads_text_as_we_do(gguf: Path, tokenizer: Tokenizer) -> None:
    script = f"""
import json
from llama_cpp import Llama
llama = Llama({str(gguf)!r}, vocab_only=True, verbose=False)
print(json.dumps([llama.tokenize(text.encode(), add_bos=False, special=False) for text in {TEXTS!r}]))
"""
    done = subprocess.run([PYTHON, "-c", script], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_its_greedy_text_is_ours_token_for_token(trained: Path, url: str, tokenizer: Tokenizer, prompt: str) -> None:
    theirs, ours = greedy_tokens(trained, url, tokenizer, prompt)
    assert theirs == ours


def test_the_mismatch_with_it_is_rounding(trained: Path, url: str, tmp_path: Path) -> None:
    results = mismatch_of(trained, url, tmp_path / "run")
    largest = only(results, quantity="difference", statistic="largest", way="endpoint").value
    assert largest is not None
    assert 0 < largest < 1e-4
    assert only(results, quantity="agreed", way="endpoint").value == 64


def test_it_is_loaded_with_the_texts_of_tokens(trained: Path, url: str, tmp_path: Path) -> None:
    keys = [f"checkpoint={trained}", "precision=fp32", "rates=[4]", "requests=6", "batches=[1]", "measure.budget=2"]
    keys += [
        "measure.prompt=8",
        "measure.new_tokens=8",
        "tracking=none",
        f"endpoint={url}",
        f"run_dir={tmp_path / 'run'}",
    ]
    script = ROOT / "experiments" / "serving.py"
    subprocess.run([sys.executable, script, *keys], cwd=ROOT, check=True, capture_output=True)
    results = read(tmp_path / "run" / "results.jsonl")
    assert only(results, quantity="failed").value == 0
    assert all(row.number > 0 for row in select(results, quantity="served tokens"))
