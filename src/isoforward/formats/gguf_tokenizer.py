"""A tokenizer in a GGUF, for llama.cpp to read text as we do: byte-level BPE that cuts text as GPT-2's does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from isoforward.data.tokenizer import Tokenizer, cuts_as_gpt2

if TYPE_CHECKING:
    from gguf import GGUFWriter

ENDS = ("eos", "eot", "eom")  # llama.cpp ends a text at any of them
OTHERWISE = (  # keys of a BPE, each of which changes what it does
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


def why_not(tokenizer: Tokenizer) -> str | None:
    """What llama.cpp would do otherwise; None where it reads every text as this tokenizer does."""
    state = json.loads(tokenizer.backend.to_str())
    model, cut = state["model"], state["pre_tokenizer"] or {}
    if model["type"] != "BPE" or any(model.get(key) for key in OTHERWISE):
        return "its model is no plain BPE"
    if state["normalizer"] is not None:
        return "it normalizes text"
    if not cuts_as_gpt2(cut):
        return "it does not cut text into words of bytes as GPT-2's does"
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in state["added_tokens"]):
        return "a token that was added takes the space around it"
    if len(tokenizer.ends) > len(ENDS):
        return f"it has {len(tokenizer.ends)} ends of text"
    plain, added = tokenizer.encode("a"), tokenizer.encode("a", template=True)
    return None if added in (plain, [tokenizer.start, *plain]) else "it adds more to a text than a beginning"


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    """`rows` are those of the embedding: llama.cpp wants a token for each, and none beyond."""
    from gguf import TokenType

    backend, tokens, kinds = tokenizer.backend, [], []
    added = backend.get_added_tokens_decoder()
    for id in range(rows):
        token = backend.id_to_token(id)
        if token is None:
            kind = TokenType.UNUSED
        elif id in added:
            kind = TokenType.CONTROL if added[id].special else TokenType.USER_DEFINED
        else:
            kind = TokenType.NORMAL
        tokens.append(f"[unused {id}]" if token is None else token)
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]])
    for name, end in zip(ENDS, tokenizer.ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", end)
    if tokenizer.start is not None:  # else llama.cpp takes GPT-2's old ids for it
        writer.add_bos_token_id(tokenizer.start)
    writer.add_add_bos_token(tokenizer.encode("a", template=True) != tokenizer.encode("a"))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
