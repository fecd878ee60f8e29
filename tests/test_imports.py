"""What a fresh process loads. Which module may import which is a contract of import-linter, in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

from isoforward.base.config import ModelConfig
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.model.gpt import GPT
from isoforward.show import report

ROOT = Path(__file__).parent.parent
HEAVY = {"lightning", "hydra", "omegaconf", "datasets", "wandb", "transformers", "vl_convert", "pandas"}


def loaded_by(statement: str) -> set[str]:
    shown = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


@pytest.mark.parametrize("module", ["serve.inference", "base.results", "show.compare", "show.tables"])
def test_serving_and_reading_load_no_training_library(module: str) -> None:
    assert loaded_by(f"import isoforward.{module}") & HEAVY == set()


def test_the_command_line_of_generate_loads_no_training_library() -> None:
    assert (
        loaded_by("import isoforward.app.generate, isoforward.app.command_line") & (HEAVY - {"hydra", "omegaconf"})
        == set()
    )


@pytest.mark.parametrize(("script", "override"), [("train.py", "model.layers=-1"), ("generate.py", "top_k=-1")])
def test_a_mistake_is_told_before_anything_heavy_is_loaded(script: str, override: str) -> None:
    """Which is what keeps the message within 3 seconds: torch alone takes two."""
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), override], capture_output=True, text=True
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines() if "|" in line}
    assert answer.returncode == 2
    assert "hydra" in loaded
    assert loaded & (HEAVY - {"hydra", "omegaconf"} | {"torch", "numpy"}) == set()


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier report has bundled Vega."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "bundled", lambda: "window.vegaEmbed = () => {};")
    report.javascript.__wrapped__()


def loaded_as(*command: str | Path) -> set[str]:
    """By a command that ends well."""
    answer = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines() if "|" in line}


@pytest.mark.usefixtures("bundled")
def test_a_plan_loads_no_tensor_library_and_builds_no_bundle(tmp_path: Path) -> None:
    """Which is what answers within 3 seconds."""
    run = tmp_path / "run"
    script = ROOT / "experiments" / "plan.py"
    loaded = loaded_as(script, "model=llama3_70b", "hardware=h100", "batch=64", f"run_dir={run}")
    assert {"hydra", "jinja2", "rich"} <= loaded
    assert loaded & (HEAVY - {"hydra", "omegaconf"} | {"torch"}) == set()
    assert "window.vegaEmbed = () => {};" in (run / "report.html").read_text()
    assert loaded_as("-m", "isoforward", "report", run) & (HEAVY | {"torch"}) == set()


def test_the_list_of_commands_loads_none_of_them() -> None:
    assert loaded_as("-m", "isoforward", "--help") & (HEAVY | {"torch", "numpy", "pydantic", "rich"}) == set()


def test_importing_changes_nothing_global() -> None:
    seen = "(torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed())"
    script = f"import torch; before = {seen}; import isoforward.serve.inference; print(before == {seen})"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "True\n"


def test_serving_a_prompt_loads_no_compiler(tmp_path: Path) -> None:
    """sympy and torch._dynamo cost a second that no eager forward needs."""
    tokenizer = Tokenizer.from_characters(["abc"])
    model = GPT(ModelConfig(layers=1, heads=2, width=8, context=16, vocab=tokenizer.vocabulary))
    export(freeze(model), tmp_path / "export", tokenizer=tokenizer)
    serve = f"from isoforward.serve.inference import load; load({str(tmp_path / 'export')!r}).generate('ab', top_p=0.9)"
    shown = f"{serve}; import sys; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    unneeded = {"sympy", "torch._dynamo", "torch._inductor", "transformers", "gguf", "jinja2"}
    assert set(answer.stdout.split()) & unneeded == set()
