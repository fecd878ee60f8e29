"""How a text goes on, and where it ends, on checkpoints as they are brought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.formats.loading import load_export
from isoforward.model.gpt import GPT
from isoforward.serve.continuation import Continuation
from isoforward.serve.decoding import Sampling
from isoforward.serve.inference import InferenceModule, load
from tests.conftest import lively, tiny
from tests.data.kinds import ALL, LLAMA
from tests.says import says

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize(
    ("ends", "generation"), [([2, 3], None), (3, None), (2, {"eos_token_id": [2, 3]}), (None, {"eos_token_id": 3})]
)
def test_every_end_that_a_checkpoint_names_ends_a_text(
    ends: list[int] | int | None, generation: dict[str, list[int]] | dict[str, int] | None, tmp_path: Path
) -> None:
    directory = says(tmp_path / "m", "<|eot|>", ends)
    (directory / "generation_config.json").write_text(json.dumps(generation or {}))
    (row,) = load(directory).complete([[1, 23, 51]], max_new_tokens=20, sampling=GREEDY)
    assert (row.tokens, row.text, row.finished) == ([3], "", "end")


def test_the_end_that_only_the_tokenizer_names_ends_a_text_too(tmp_path: Path) -> None:
    directory = says(tmp_path / "m", "</s>", 3)
    (directory / "generation_config.json").unlink()
    assert load(directory).generate("the king", temperature=0) == ""


def test_an_import_and_the_export_of_a_run_keep_all_ends_and_the_chat_template(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = says(tmp_path / "m", "<|eot|>", [3, 2])
    model, tokenizer = load_export(source)
    export(model, tmp_path / "export", tokenizer=tokenizer)
    assert load(tmp_path / "export").tokenizer.ends == (3, 2)
    for theirs in (
        transformers.AutoConfig.from_pretrained(tmp_path / "export"),
        transformers.GenerationConfig.from_pretrained(tmp_path / "export"),
    ):
        assert (theirs.eos_token_id, theirs.bos_token_id) == ([3, 2], 1)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "export", source))
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("the king")["input_ids"] == theirs("the king")["input_ids"]


def test_a_prompt_has_the_ids_that_transformers_gives_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    module = load(says(tmp_path / "m", "▁sea", 2))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert module.encode("the king") == theirs("the king")["input_ids"]
    assert module.encode("the king")[0] == 1
    assert module.encode("the king", template=False) == theirs("the king", add_special_tokens=False)["input_ids"]
    assert module.encode("the king</s>", special=True) == theirs("the king</s>")["input_ids"]
    assert module.encode("") == [1] == module.encode("", template=False)
    messages = [{"role": "user", "content": "the king"}]
    assert module.encode_chat("the king") == theirs.apply_chat_template(messages, return_dict=False)


def test_a_space_between_words_is_written_in_a_batch_as_one_by_one(tmp_path: Path) -> None:
    module = load(says(tmp_path / "m", "▁sea", 2))
    prompts = ["the king", "the queen went", ""]
    asked: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3}
    assert module.generate(prompts, **asked) == [" sea sea sea", " sea sea sea", "sea sea sea"]
    assert module.generate(prompts, **asked) == [module.generate(prompt, **asked) for prompt in prompts]


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_says_what_each_prompt_alone_says_whatever_the_tokenizer(kind: str) -> None:
    tokenizer = ALL[kind]
    module = InferenceModule(freeze(lively(GPT(tiny(vocab=tokenizer.vocabulary + 3)))), tokenizer)  # 3 rows to spare
    prompts = ["the sun", "what light", "east"]
    asked: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
    together = module.generate(prompts, **asked)
    assert together == [module.generate(prompt, **asked) for prompt in prompts]
    for prompt, text in zip(prompts, together, strict=True):
        streamed = module.stream(prompt, max_new_tokens=12, sampling=GREEDY)
        assert "".join(piece for piece, _ in streamed) == text


@pytest.mark.parametrize("options", [{}, {"cache": False}], ids=["cached", "uncached"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_row_of_a_batch_has_the_room_that_its_own_prompt_leaves(family: str, options: dict[str, Any]) -> None:
    """Contexts of 32: prompts of 30, 5 and 1 tokens have room for 3, 28 and 32."""
    tokenizer = Tokenizer.from_characters(["abc"])
    model = freeze(lively(GPT(tiny(vocab=4, family=family))))
    tokenizer.ends = ()
    module = InferenceModule(model, tokenizer)
    prompts = [[1] * 30, [2, 3, 1, 2, 3], [1], [3] * 32]
    rows = module.complete(prompts, max_new_tokens=40, sampling=GREEDY, **options)
    assert [len(row.tokens) for row in rows] == [3, 28, 32, 1]
    assert all(row.fills(32) for row in rows)
    for row, prompt in zip(rows, prompts, strict=True):
        (alone,) = module.complete([prompt], max_new_tokens=40, sampling=GREEDY)
        assert row.tokens == alone.tokens
    rows = module.complete(prompts, max_new_tokens=10, sampling=GREEDY, **options)
    assert [(len(row.tokens), row.fills(32)) for row in rows] == [(3, True), (10, False), (10, False), (1, True)]


def test_a_batch_takes_no_more_cache_than_its_context_has_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    capacities = []
    monkeypatch.setattr("isoforward.serve.decoding.kv_bytes", lambda *_, length, **__: capacities.append(length) or 0)
    tokenizer = Tokenizer.from_characters(["abc"])
    module = InferenceModule(freeze(GPT(tiny(vocab=4))), tokenizer)
    module.complete([[1] * 30, [2]], max_new_tokens=10**6)
    module.complete([[1] * 3, [2]], max_new_tokens=4)
    assert capacities == [32, 7]


def test_rows_that_only_pad_a_vocabulary_say_nothing(tmp_path: Path) -> None:
    module = load(says(tmp_path / "m", "none such", 2, rows=64))
    (row,) = module.complete([[1, 23]], max_new_tokens=3, sampling=GREEDY)
    assert (row.tokens, row.text) == ([63] * 3, "")


def test_a_token_that_was_added_without_a_row_is_refused_only_where_it_is_used(tmp_path: Path) -> None:
    module = load(says(tmp_path / "m", "▁sea", 2, added=("[PAD]",)))
    assert module.generate("the king", temperature=0, max_new_tokens=1) == " sea"
    with pytest.raises(BadInput, match=r"\[PAD\]', token 54, .* its embedding has 54 rows"):
        module.generate("the [PAD]")
    export(module.model, tmp_path / "export", tokenizer=module.tokenizer)
    assert load(tmp_path / "export").generate("the king", temperature=0, max_new_tokens=1) == " sea"


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_log_probabilities_are_the_models_own_whatever_is_drawn(penalty: float) -> None:
    """As the log-softmax of the full forward's logits, in fp64: before penalty, temperature and cuts."""
    tokenizer = Tokenizer.from_characters(["abcdefgh"])
    module = InferenceModule(freeze(lively(GPT(tiny(vocab=tokenizer.vocabulary)))), tokenizer)
    prompts = [[1, 2, 3], [4]]
    sampling = Sampling(temperature=2, top_k=5, repetition_penalty=penalty)
    for row, prompt in zip(
        module.complete(prompts, max_new_tokens=6, sampling=sampling, logprobs=True), prompts, strict=True
    ):
        logits = module(torch.tensor([[*prompt, *row.tokens]]))[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(row.tokens)[:, None]).flatten()
        torch.testing.assert_close(torch.tensor(row.logprobs, dtype=torch.double), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["the sun and the east", "a 日 b"])
@pytest.mark.parametrize("stop", [None, "the east", "sun", "zzz"])
def test_pieces_are_the_text_and_stop_ends_it(text: str, stop: str | None) -> None:
    ids = LLAMA.encode(text)
    row = Continuation(LLAMA, [], stop=stop)
    said = "".join([row.add(id) for id in ids]) + row.close()
    assert said == row.text == (text.partition(stop)[0] if stop else text)
    assert row.finished == ("stop" if stop and stop in text else None)
    assert "".join(row.pieces).startswith(row.text)
    if not row.finished:
        assert "".join(row.pieces) == text and len(row.pieces) == len(ids)
