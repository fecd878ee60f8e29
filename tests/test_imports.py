"""Who may know whom. The walls are read from the source and, where it matters to users, seen in a fresh process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import isoforward
from isoforward.base.config import ModelConfig
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.model.gpt import GPT

SOURCE = Path(isoforward.__file__).parent
ROOT = Path(__file__).parent.parent
HEAVY = {"lightning", "hydra", "omegaconf", "datasets", "wandb", "transformers", "altair", "pandas"}
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)
ROOMS = {"isoforward", *(f"isoforward.{module.rpartition('.')[0]}" for module in MODULES if "." in module)}


def imported(module: str, *, top: bool = False) -> set[str]:
    """Modules named in imports: ours as `isoforward.x`, others by their first name."""
    tree = ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in named if name.removeprefix("isoforward.") in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name if name.startswith("isoforward.") else name.partition(".")[0] for name in found}


def reached(module: str) -> set[str]:
    """Ours that are imported together with `module`."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imported(waiting.pop(), top=True):
            ours = name.removeprefix("isoforward.")
            if name.startswith("isoforward.") and ours not in found:
                found.add(ours)
                waiting.append(ours)
    return found


def test_no_module_reaches_itself():
    assert [module for module in MODULES if module in reached(module)] == []


@pytest.mark.parametrize(
    "module",
    [
        "base.config",
        "base.errors",
        "model.cost",
        "model.footprint",
        "plan.economics",
        "base.datasheets",
        "base.storage",
        "base.malloc",
        "base.units",
    ],
)
def test_what_stands_at_the_top_is_stdlib_alone(module):
    outside = {name for name in imported(module) if not name.startswith("isoforward.")}
    assert outside <= set(sys.stdlib_module_names) | {"__future__"}


@pytest.mark.parametrize("module", ["model.gpt", "model.steps"])
def test_the_forward_and_its_steps_know_nothing_but_torch(module):
    outside = {name for name in imported(module) if not name.startswith("isoforward.")}
    assert outside <= set(sys.stdlib_module_names) | {"torch", "__future__"}
    assert reached(module) <= {"base.config", "base.errors", "model.linear_kernels", "model.loss", "model.gpt"}


@pytest.mark.parametrize(
    "measured",
    [
        "model.gpt",
        "model.steps",
        "serve.inference",
        "serve.decoding",
        "serve.speculative",
        "serve.quantised",
        "serve.compiled",
        "model.optim",
        "data.corpus",
        "data.batches",
        "data.tokenizer",
        "formats.export",
        "formats.model_card",
        "serve.transformers_model",
    ],
)
def test_what_is_measured_never_imports_what_measures_it(measured):
    assert not reached(measured) & {
        "base.stopwatch",
        "measure.case",
        "measure.memory_ledger",
        "measure.flops",
        "base.estimates",
        "show.compare",
    }


def test_wandb_is_imported_in_one_place():
    assert [module for module in MODULES if "wandb" in imported(module)] == ["show.wandb_tracker"]


def loaded_by(statement: str) -> set[str]:
    shown = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


@pytest.mark.parametrize("module", ["serve.inference", "base.results", "show.compare", "show.tables"])
def test_serving_and_reading_load_no_training_library(module):
    assert loaded_by(f"import isoforward.{module}") & HEAVY == set()


def test_the_command_line_of_generate_loads_no_training_library():
    assert (
        loaded_by("import isoforward.app.generate, isoforward.app.command_line") & (HEAVY - {"hydra", "omegaconf"})
        == set()
    )


@pytest.mark.parametrize(("script", "override"), [("train.py", "model.layers=-1"), ("generate.py", "top_k=-1")])
def test_a_mistake_is_told_before_anything_heavy_is_loaded(script, override):
    """Which is what keeps the message within 3 seconds: torch alone takes two."""
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), override], capture_output=True, text=True
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines() if "|" in line}
    assert answer.returncode == 2
    assert "hydra" in loaded
    assert loaded & (HEAVY - {"hydra", "omegaconf"} | {"torch", "numpy"}) == set()


def test_importing_changes_nothing_global():
    seen = "(torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed())"
    script = f"import torch; before = {seen}; import isoforward.serve.inference; print(before == {seen})"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "True\n"


def test_serving_a_prompt_loads_no_compiler(tmp_path):
    """sympy and torch._dynamo cost a second that no eager forward needs."""
    tokenizer = Tokenizer.from_characters(["abc"])
    model = GPT(ModelConfig(layers=1, heads=2, width=8, context=16, vocab=tokenizer.vocabulary))
    export(freeze(model), tmp_path / "export", tokenizer=tokenizer)
    serve = f"from isoforward.serve.inference import load; load({str(tmp_path / 'export')!r}).generate('ab', top_p=0.9)"
    shown = f"{serve}; import sys; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert set(answer.stdout.split()) & {"sympy", "torch._dynamo", "torch._inductor", "transformers", "gguf"} == set()
