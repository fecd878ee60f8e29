"""What a page can hold of a model and of its tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.lesson.packing import forward_of, packed_model, packed_tokenizer
from isoforward.serve.inference import load
from tests.conftest import tiny

from .conftest import make_export, make_lesson
from .test_numbers import TOKENS, as_the_page_has_them, ask, data_of


def test_eight_bits_are_read_as_they_were_written(node: str, tmp_path: Path) -> None:
    lesson = make_lesson(tmp_path, family="llama", layers=1, heads=2, width=32)
    packed = packed_model(lesson.model, 8)
    assert {each["bits"] for each in packed["weights"]["tensors"]} == {8, 32}
    html = lesson.page.read_text("utf-8")
    data = data_of(html)
    page = tmp_path / "eight.html"
    script = re.search(r"<script>(.*)</script>", html, re.S)
    assert script
    told = json.dumps(data | {"model": packed}).replace("<", "\\u003c")
    page.write_text(f'<script type="application/json" id="data">{told}</script><script>{script[1]}</script>', "utf-8")
    found = ask(node, page, tokens=TOKENS)
    model = as_the_page_has_them(load(lesson.export).model, packed)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS[:-1]]))
    assert np.abs(np.array(found["logits"]) - logits.flatten().numpy()).max() < 1e-4


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
START = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
NAMED = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}


def template(*single: Any) -> dict[str, object]:
    special = {"<|endoftext|>": NAMED} if START in single else {}
    return {"type": "TemplateProcessing", "single": single, "pair": [TEXT], "special_tokens": special}


def with_more(export: Path, **more: object) -> Tokenizer:
    backend = Tokenizer.load(export / "tokenizer.json").backend
    return Tokenizer(type(backend).from_str(json.dumps(json.loads(backend.to_str()) | more)))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "has a normalizer, Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text into words in another way, Whitespace"),
        ({"post_processor": template(START, TEXT)}, "adds tokens to every text"),
        ({"post_processor": {"type": "Sequence", "processors": [template(START, TEXT)]}}, "adds tokens to every text"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "is WordLevel"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_what_it_has(
    more: dict[str, object], what: str, tmp_path: Path
) -> None:
    export = make_export(tmp_path / "export", family="gpt2", layers=1, heads=2, width=16)
    with pytest.raises(
        BadInput, match=rf"this model's tokenizer {what}; .* data\.tokenizer=bpe or data\.tokenizer=char"
    ):
        packed_tokenizer(with_more(export, **more))


def test_a_template_that_adds_nothing_is_none(tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", family="gpt2", layers=1, heads=2, width=16)
    plain = packed_tokenizer(with_more(export))
    assert packed_tokenizer(with_more(export, post_processor=template(TEXT))) == plain


@pytest.mark.parametrize(
    "other",
    [
        {"family": "qwen3"},
        {"family": "olmo2"},
        {"family": "gemma"},
        {"family": "llama", "head_dim": 4},
        {"family": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_a_forward_that_the_page_does_not_compute_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(
        BadInput, match="the page computes the forwards of GPT-2 and Llama, and this model's is another"
    ):
        forward_of(tiny(**other))
