"""Tokenizers that are no tokenizer.json: read as Transformers reads them, or refused with the way out."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from isoforward.base.errors import BadInput
from isoforward.formats.export import export
from isoforward.formats.loading import load_export, load_tokenizer
from tests.data.kinds import BPE, HARD, TEXT

transformers = pytest.importorskip("transformers")


def in_two_files(directory: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 was published, with a config that names another end of text too."""
    model = json.loads(BPE.backend.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    about = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ messages[0].content }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": [5, 0]}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    return directory


def test_a_vocabulary_and_merges_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    ours = load_tokenizer(in_two_files(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, HARD):
        assert ours.encode(text, template=True, special=True) == theirs(text)["input_ids"] == BPE.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.ends == (5, 0, 7) and ours.chat_template == "{{ messages[0].content }}"


def test_an_import_writes_them_as_one_file(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=BPE.vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    config.eos_token_id = 0
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    settings = (tmp_path / "config.json").read_text()
    in_two_files(tmp_path)
    (tmp_path / "config.json").write_text(settings)
    model, tokenizer = load_export(tmp_path)
    export(model, tmp_path / "export", tokenizer=tokenizer)
    assert load_export(tmp_path / "export")[1].encode(HARD) == BPE.encode(HARD)


def test_a_sentencepiece_model_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    without = lambda name: None if name == "sentencepiece" else find_spec(name)  # noqa: E731
    monkeypatch.setattr("isoforward.formats.transformers_tokenizer.find_spec", without)
    with pytest.raises(BadInput, match=r"tokenizer\.model is a SentencePiece model.*pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_a_file_that_transformers_cannot_read_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("[]")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BadInput, match=r"put the tokenizer\.json of that model beside it"):
        load_tokenizer(tmp_path)


def test_without_any_tokenizer_all_that_could_be_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer\.json .*vocab\.json and merges\.txt.*tokenizer\.model"):
        load_tokenizer(tmp_path)
