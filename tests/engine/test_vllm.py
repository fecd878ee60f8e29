"""vLLM serves the export of a training: our greedy text token for token, and the numbers of `mismatch endpoint=`.

`make engine` sets it up in .venv-engine; nothing else needs that.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from isoforward.base.results import only, select
from isoforward.data.tokenizer import Tokenizer
from tests.engine.servers import PROMPTS, ROOT, greedy_tokens, mismatch_of, started

PYTHON = ROOT / ".venv-engine" / "bin" / "python"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-engine: make engine sets it up"),
]


@pytest.fixture(scope="module")
def url(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(trained / "export")]
    command += ["--enforce-eager", "--dtype", "float32"]
    environment = {**OFFLINE, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with started(command, environment, "/health", tmp_path_factory.mktemp("vllm")) as url:
        yield url


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
    exact = [row.value for row in select(results, quantity="equal") if "exact" in str(row.conditions["way"])]
    assert set(exact) == {1.0}
