from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from isoforward.data.streaming import BYTE_OF, Stream
from isoforward.data.tokenizer import Tokenizer
from tests.data.kinds import ALL, BPE, CHARACTERS, GPT2, HARD, LLAMA, TEXT, UNIGRAM, WORDPIECE


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = Stream(tokenizer, prompt or [])
    return [*(stream.push(id) for id in ids), stream.flush()]


@given(st.text(alphabet=sorted(set(TEXT + HARD))))
@settings(deadline=None)
def test_characters_bring_their_text_back_one_id_each(text: str) -> None:
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text == "".join(streamed(CHARACTERS, ids))


@given(st.text())
@settings(deadline=None)
def test_streamed_text_is_decoded_text(text: str) -> None:
    for tokenizer in (GPT2, BPE, LLAMA, WORDPIECE, UNIGRAM):
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.one_of(st.integers(0, 50256), st.sampled_from([GPT2.backend.token_to_id(c) for c in BYTE_OF]))))
@settings(deadline=None)
def test_streamed_ids_of_a_byte_level_model_decode_alike_even_where_they_are_no_text(ids: list[int]) -> None:
    assert "".join(streamed(GPT2, ids)) == GPT2.decode(ids)


@given(st.lists(st.one_of(st.integers(259, LLAMA.vocabulary - 1), st.sampled_from([1, 2]))))  # 1, 2: special
@settings(deadline=None)
def test_streamed_words_of_any_other_model_decode_alike_whatever_their_order(ids: list[int]) -> None:
    space = LLAMA.backend.token_to_id("▁")
    assert space is not None
    for order in (ids, [space, *ids], [space, space, *ids]):
        assert "".join(streamed(LLAMA, order)) == LLAMA.decode(order)


@given(st.data())
@settings(deadline=None)
def test_streamed_pieces_decode_alike_whatever_joins_them(data: st.DataObject) -> None:
    for tokenizer in (WORDPIECE, UNIGRAM):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1)))
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data())
@settings(deadline=None)
def test_a_continuation_streamed_after_its_prompt_is_what_decoding_both_adds(kind: str, data: st.DataObject) -> None:
    """Whatever is said after whatever prompt; ids that no token has are those of rows that only pad a vocabulary."""
    tokenizer = ALL[kind]
    ids = st.lists(st.integers(0, tokenizer.vocabulary + 3).filter(lambda id: not is_a_byte(tokenizer, id)))
    prompt, said = data.draw(ids), data.draw(ids)
    before, both = tokenizer.decode(prompt), tokenizer.decode([*prompt, *said])
    assume(both.startswith(before) and not before.endswith("\ufffd"))  # a prompt is text: it ends with a character
    assert before + "".join(streamed(tokenizer, said, prompt)) == both


def is_a_byte(tokenizer: Tokenizer, id: int) -> bool:
    """Any order of these is no UTF-8: below is what is promised of them."""
    return str(tokenizer.backend.id_to_token(id)).startswith("<0x")


@pytest.mark.parametrize("kind", ALL)
@given(text=st.text(alphabet=sorted({*TEXT})), cut=st.integers(0, 20))
@settings(deadline=None)
def test_a_text_cut_anywhere_streams_on_to_the_same_text(kind: str, text: str, cut: int) -> None:
    ids = ALL[kind].encode(text)
    before, both = ALL[kind].decode(ids[:cut]), ALL[kind].decode(ids)
    assume(both.startswith(before))
    assert before + "".join(streamed(ALL[kind], ids[cut:], ids[:cut])) == both


@pytest.mark.parametrize("id", [1, 10**6])
def test_ids_that_leave_no_text_do_not_make_the_stream_slower(id: int) -> None:
    lengths: list[int] = []
    tokenizer = Tokenizer(Backend.from_str(LLAMA.backend.to_str()))
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **_: lengths.append(len(ids)) or decode(ids)  # type: ignore[method-assign]  # a spy
    streamed(tokenizer, [*LLAMA.encode("the sun"), *[id] * 500, *LLAMA.encode("the sun")])
    assert max(lengths) <= 8


@given(st.lists(st.integers(0, LLAMA.vocabulary - 1)))
@settings(deadline=None)
def test_a_stream_of_broken_bytes_neither_fails_nor_loses_whole_words(ids: list[int]) -> None:
    words = [str(LLAMA.backend.id_to_token(id)).replace("▁", " ") for id in ids if id > 258]
    text, at = " " + "".join(streamed(LLAMA, ids)), 0
    for word in words:
        at = text.index(word.strip(), at) + len(word.strip())


@pytest.mark.parametrize("tokenizer", [GPT2, BPE, LLAMA], ids=["gpt2", "bpe", "llama"])
def test_a_character_split_over_tokens_leaves_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("sun 😀日")
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == "sun 😀日"
    assert "" in pieces[:-1]  # something was held back
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_goes_on_after_its_prompt_with_the_space_between_words() -> None:
    prompt, rest = LLAMA.encode("what light")[:-1], LLAMA.encode("the light")
    assert "".join(streamed(LLAMA, rest, prompt)) == " the light"
    assert "".join(streamed(LLAMA, rest)) == "the light"


def test_a_stream_never_decodes_more_than_a_few_ids_at_once() -> None:
    lengths: list[int] = []

    class Counting(Tokenizer):
        def decode(self, ids, **options):  # type: ignore[no-untyped-def]
            lengths.append(len(ids))
            return super().decode(ids, **options)

    tokenizer = Counting(Backend.from_str(LLAMA.backend.to_str()))
    invalid = tokenizer.backend.token_to_id("<0xFF>")
    assert invalid is not None
    streamed(tokenizer, [*LLAMA.encode(TEXT), *[invalid] * 500])
    assert max(lengths) <= 8
