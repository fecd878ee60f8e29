"""Tokenizers that are no tokenizer.json, read by Transformers, which knows the many ways in which they are spelt."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import NAMED, Tokenizer
from isoforward.formats.untrusted import shown

SENTENCEPIECE = "tokenizer.model"


def has_foreign_tokenizer(directory: Path) -> bool:
    """GPT-2's two files, or a SentencePiece model."""
    pair = (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()
    return pair or (directory / SENTENCEPIECE).is_file()


def read_foreign_tokenizer(directory: Path, *, ends: Iterable[int | None], gguf: str | None = None) -> Tokenizer:
    """Of a Transformers directory, or of the file `gguf` in it. Code that a directory brings along never runs."""
    where = directory / (gguf or "")
    if find_spec("transformers") is None:
        raise BadInput(f"the tokenizer of {where} needs Transformers: pip install isoforward[hf]")
    if gguf is None and not (directory / "vocab.json").is_file() and find_spec("sentencepiece") is None:
        raise BadInput(
            f"{directory / SENTENCEPIECE} is a SentencePiece model, which needs the package sentencepiece: "
            "pip install sentencepiece, or put the tokenizer.json of that model beside it"
        )
    from transformers import AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        theirs = AutoTokenizer.from_pretrained(directory, **options, **({"gguf_file": gguf} if gguf else {}))
        backend = theirs.backend_tokenizer
    except Exception as error:  # each of its many readers fails in its own way
        first = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"Transformers cannot read the tokenizer of {where}: {shown(first)}; "
            "put the tokenizer.json of that model beside it"
        ) from error
    named = {role: str(getattr(theirs, role)) for role in NAMED if getattr(theirs, role) is not None}
    template = theirs.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return Tokenizer(backend, [*ends, theirs.eos_token_id], named=named, chat_template=template)
