"""The page's arithmetic against torch, on the weights as the page holds them; run under Node."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isoforward.base.config import OptimConfig
from isoforward.data.tokenizer import Tokenizer
from isoforward.model import cost, steps
from isoforward.model.gpt import GPT
from isoforward.model.loss import next_token_loss
from isoforward.model.optim import build
from isoforward.serve.inference import load

from .conftest import Lesson, make_lesson

CHECK = Path(__file__).with_name("check.mjs")
RECORDED = Path(__file__).parents[2] / "docs" / "recorded"
TOKENS = [5, 3, 9, 1, 7, 7, 2, 30, 11, 4, 8, 20]
PROMPT = [4, 17, 9, 22, 6]
COUNT = 12
ADAMW = {"lr": 1e-3, "decay": 0.1, "betas": [0.9, 0.95], "clip": 1}
TEXTS = [
    "To be, or not to be",
    "ROMEO:\n  it's   nobler\t\t x",
    "I'll they've 123abc ½ don't!?",
    "naïve café — “quoted” … 中文 字",
    "שלום \u202eabc\u202c ﷽ \u00a0\u3000x\u0085y\ufeff\u2028z",
    "<|endoftext|> <b>&amp;</b> 🙂👩‍👩‍👧",
    "   leading and trailing   ",
    "",
]


def ask(node: str, page: Path, **asked: Any) -> dict[str, Any]:
    done = subprocess.run([node, str(CHECK), str(page)], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


def as_the_page_has_them(model: GPT, packed: Mapping[str, Any]) -> GPT:
    """The weights read back by another reader of the format than the page's."""
    data, at = zlib.decompress(base64.b64decode(packed["weights"]["data"])), 0
    with torch.no_grad():
        for (name, parameter), told in zip(model.named_parameters(), packed["weights"]["tensors"], strict=True):
            assert (told["name"], told["shape"]) == (name, list(parameter.shape))
            count = parameter.numel()
            if told["bits"] == 32:
                values = np.frombuffer(data, "<f4", count, at)
                at += 4 * count
            elif told["bits"] == 16:
                high, low = (np.frombuffer(data, np.uint8, count, at + part * count) for part in (0, 1))
                values = np.stack([low, high], axis=1).reshape(-1).view("<f2").astype(np.float32)
                at += 2 * count
            else:
                rows = told["shape"][0]
                integers = np.frombuffer(data, np.int8, count, at).reshape(rows, -1)
                values = integers * np.frombuffer(data, "<f4", rows, at + count)[:, None]
                at += count + 4 * rows
            parameter.copy_(torch.from_numpy(values.astype(np.float32).reshape(parameter.shape)))
    assert at == len(data)
    return model


@pytest.fixture(scope="module")
def torch_model(lesson: Lesson) -> GPT:
    model = load(lesson.export).model
    as_the_page_has_them(model, data_of(lesson.page.read_text("utf-8"))["model"])
    return model.float().requires_grad_(True)


@pytest.fixture(scope="module")
def answer(node: str, lesson: Lesson) -> dict[str, Any]:
    return ask(node, lesson.page, tokens=TOKENS, prompt=PROMPT, count=COUNT)


def test_logits_and_loss_are_those_of_torch(answer: dict[str, Any], torch_model: GPT) -> None:
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        logits = torch_model(tokens[:, :-1])
        loss = next_token_loss(logits, tokens[:, 1:])
    assert np.abs(np.array(answer["logits"]) - logits.flatten().numpy()).max() < 1e-4
    assert answer["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_every_gradient_is_that_of_torch(answer: dict[str, Any], torch_model: GPT) -> None:
    tokens = torch.tensor([TOKENS])
    torch_model.zero_grad()
    next_token_loss(torch_model(tokens[:, :-1]), tokens[:, 1:]).backward()
    named = dict(torch_model.named_parameters())
    assert answer["gradients"].keys() == named.keys()
    for name, parameter in named.items():
        assert parameter.grad is not None
        theirs, ours = parameter.grad.flatten().double(), torch.tensor(answer["gradients"][name]).double()
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3, name
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3, name


def test_teacher_forcing_gives_what_one_by_one_gives(answer: dict[str, Any]) -> None:
    assert answer["apart"] == 0  # sums run in the same order, so not even a rounding differs


def test_greedy_text_is_that_of_torch_with_and_without_a_cache(answer: dict[str, Any], torch_model: GPT) -> None:
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(COUNT):
            logits = torch_model(tokens)[:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1)[:, None]), dim=1)
    cached, uncached = answer["cached"], answer["uncached"]
    assert cached["tokens"] == uncached["tokens"] == tokens[0].tolist()
    assert cached["logits"] == uncached["logits"]
    assert np.abs(np.array(cached["logits"]) - logits[0].numpy()).max() < 1e-4


def test_a_pass_is_counted_as_the_formulas_of_cost_count_it(answer: dict[str, Any], torch_model: GPT) -> None:
    config, looked_up = torch_model.config, (2 if torch_model.positions is not None else 1) * torch_model.config.width
    weights = cost.parameters(config).total - (config.context * config.width if looked_up > config.width else 0)
    if not config.tied:
        weights -= config.vocabulary * config.width  # of the embedding only the rows that are looked up are read
    a_position = 2 * config.layers * config.kv_width
    for n, (with_cache, without) in enumerate(
        zip(answer["cached"]["passes"], answer["uncached"]["passes"], strict=True)
    ):
        seen = len(PROMPT) + n
        assert (with_cache["computed"], with_cache["past"]) == ((1, seen - 1) if n else (seen, 0))
        assert (without["computed"], without["past"]) == (seen, 0)
        full = cost.forward_flops(config, batch=1, length=seen, logits="last").total
        assert without["flops"] == full
        assert with_cache["flops"] == (cost.decode_flops(config, batch=1, cached=seen - 1).total if n else full)
        assert without["bytes"] == 4 * (weights + seen * looked_up)
        assert with_cache["bytes"] == 4 * (weights + with_cache["computed"] * looked_up + seen * a_position)


def test_training_steps_are_those_of_steps_py(node: str, lesson: Lesson, torch_model: GPT) -> None:
    found = ask(node, lesson.page, tokens=TOKENS, steps=3, adamw=ADAMW)
    model = load(lesson.export).model
    model.load_state_dict(torch_model.state_dict())
    optimizer = build(model.requires_grad_(True).train(), OptimConfig(lr=1e-3, weight_decay=0.1))
    tokens = torch.tensor([TOKENS])
    losses = [float(steps.train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], clip=1.0)[0]) for _ in range(3)]
    assert found["losses"] == pytest.approx(losses, rel=1e-4)
    for name, parameter in model.named_parameters():
        ours = torch.tensor(found["after"][name])
        # Adam's first steps are as long whatever the gradient's size, so that one of rounding size points anywhere.
        near = (ours - parameter.detach().flatten()).abs() < 1e-4
        assert float(near.float().mean()) > 0.99, name


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_text_becomes_the_ids_of_tokenizers_and_text_again(
    node: str, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    lesson = make_lesson(tmp_path, kind=kind, family="gpt2", layers=1, heads=1, width=8)
    found = ask(node, lesson.page, texts=TEXTS)
    for text, ids, decoded in zip(TEXTS, found["encoded"], found["decoded"], strict=True):
        assert ids == known(lesson.tokenizer, text), text
        assert ids is None or decoded == lesson.tokenizer.decode(ids)


def known(tokenizer: Tokenizer, text: str) -> list[int] | None:
    try:
        return tokenizer.encode(text)
    except ValueError:
        return None
