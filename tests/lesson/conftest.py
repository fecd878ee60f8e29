"""Small exports of both kinds of block with either kind of tokenizer, and their pages."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from isoforward.base.config import ModelConfig
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export
from isoforward.lesson.page import build_page, write_page
from isoforward.model.gpt import GPT
from isoforward.serve.inference import load

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n\nROMEO: But soft! "
SHAPES = {
    "gpt2": {"family": "gpt2", "layers": 2, "heads": 4, "width": 32},
    "gpt2 without biases": {"family": "gpt2", "layers": 2, "heads": 4, "width": 32, "bias": False, "tied": False},
    "llama": {"family": "llama", "layers": 2, "heads": 4, "width": 32},
    "llama, grouped heads": {"family": "llama", "layers": 3, "heads": 4, "kv_heads": 2, "width": 48, "tied": False},
    "qwen2": {"family": "qwen2", "layers": 2, "heads": 4, "width": 32},
    "llama 3's rotation": {
        "family": "llama",
        "layers": 1,
        "heads": 2,
        "width": 32,
        "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 16},
    },
}


@dataclass(frozen=True)
class Lesson:
    page: Path
    model: GPT  # with the exported weights, in fp32
    tokenizer: Tokenizer
    export: Path


def make_export(directory: Path, *, kind: str = "bpe", **shape: object) -> Path:
    text = [TEXT * 3]
    tokenizer = Tokenizer.train_bpe(text, 300) if kind == "bpe" else Tokenizer.from_characters(text)
    config = ModelConfig(**{"context": 64, "vocab": tokenizer.vocabulary, **shape})  # type: ignore[arg-type]
    torch.manual_seed(3)
    model = GPT(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for every layer, bias and position to matter
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.06)
    return export(model, directory, tokenizer=tokenizer)


def make_lesson(directory: Path, **about: object) -> Lesson:
    exported = make_export(directory / "export", **about)  # type: ignore[arg-type]
    module = load(exported)
    page = write_page(build_page(module, None, name="a run"), directory / "lesson.html")
    return Lesson(page=page, model=module.model, tokenizer=module.tokenizer, export=exported)


@pytest.fixture(scope="session", params=list(SHAPES.values()), ids=list(SHAPES))
def lesson(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    kind = "char" if request.param["family"] == "llama" and "kv_heads" not in request.param else "bpe"
    return make_lesson(tmp_path_factory.mktemp("lesson"), kind=kind, **request.param)


@pytest.fixture(scope="session")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("the page's JavaScript runs under Node here: install nodejs 18 or later")
    return found
