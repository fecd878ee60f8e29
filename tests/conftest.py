import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from isoforward.base import choices
from isoforward.base.config import KERNELS_VARIABLE, ModelConfig
from isoforward.base.disturbance import Disturbance
from isoforward.model.gpt import GPT
from tests.loaded import loaded_python

SHAPES = {
    "gpt2": {"family": "gpt2"},
    "gpt2 without biases": {"family": "gpt2", "bias": False, "tied": False},
    "llama": {"family": "llama"},
    "llama, grouped heads": {"family": "llama", "kv_heads": 2, "tied": False},
    "qwen2": {"family": "qwen2", "kv_heads": 2},
    "qwen3": {"family": "qwen3", "kv_heads": 2, "head_dim": 16},
    "olmo2": {"family": "olmo2", "tied": False},
    "gemma": {"family": "gemma", "kv_heads": 1, "head_dim": 12},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of the whole take the longest: begun first, they leave no process waiting for another at the end."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def pytest_collection_finish() -> None:
    """What modules hold stays: no test that collects garbage, nor Python itself, has to look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors as small as the tests' are slowed down by threads that wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_disk_to_wait_for() -> None:
    """Nobody pulls the plug here: a killed process loses nothing that it has written."""
    os.fsync = lambda fd: None


@pytest.fixture(scope="session", autouse=True)
def reference_kernels() -> None:
    """What a busy or another machine would choose is no matter of a test."""
    os.environ[KERNELS_VARIABLE] = "reference"


@pytest.fixture
def processes_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the code under test starts of its own."""
    monkeypatch.setattr(sys, "executable", loaded_python())


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that chooses kernels, on a machine that nothing disturbs, with a cache of its own."""
    monkeypatch.delenv(KERNELS_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_measuring", choices.Measuring())
    monkeypatch.setattr(choices, "between", lambda before, after: Disturbance(elapsed_s=1.0))


def tiny(**more: object) -> ModelConfig:
    sizes: dict[str, Any] = {"layers": 2, "heads": 4, "width": 32, "context": 32, "vocab": 61}
    return ModelConfig(**{**sizes, **more})


def lively(model: GPT) -> GPT:
    """Weights large enough for every layer, bias and position to matter to the logits."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in filter(torch.Tensor.is_floating_point, model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.06)
    return model


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return tiny(**request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))
