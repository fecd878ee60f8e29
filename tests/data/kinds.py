"""One tokenizer of each kind, made small."""

from __future__ import annotations

import json

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from isoforward.data.tokenizer import Tokenizer

TEXT = "But soft! what light through yonder window breaks? It is the east, and Juliet is the sun.\n" * 4
HARD = "naïve 日本語 👩‍👩‍👧 😀😃 e\u0301  two  spaces\n\n\tend\ufffd"

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


def metaspace() -> Tokenizer:
    """Spaces as ▁, one before the text; words of its own that were added by hand, one of them special."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", "<|eot|>"]
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    backend.add_tokens(["<tool>", " sun"])
    backend.add_special_tokens(["<|last|>"])
    return Tokenizer(backend)


def byte_level_with_added() -> Tokenizer:
    backend = Backend.from_str(BPE.backend.to_str())
    backend.add_tokens(["<tool>", "café", " ", "日本"])
    return Tokenizer(backend)


WORDPIECE, UNIGRAM, METASPACE, ADDED = wordpiece(), unigram(), metaspace(), byte_level_with_added()
ALL = {
    "gpt2": GPT2,
    "bpe": BPE,
    "characters": CHARACTERS,
    "llama": LLAMA,
    "wordpiece": WORDPIECE,
    "unigram": UNIGRAM,
    "metaspace": METASPACE,
    "added": ADDED,
}
