"""Ids to text as they come: a piece leaves once its characters are whole."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import decoders

from isoforward.data.tokenizer import Tokenizer


class Stream:
    """Decodes ids as they come: text leaves once its characters are whole, in time linear in the number of ids.

    What `push` and one last `flush` return is together `decode(ids)`. Only where a tokenizer falls back to single
    bytes, and they are no UTF-8, may it differ: whole characters that have left cannot be taken back. `prompt` is what
    the ids continue: some tokenizers write no space before the first word of a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.token, self.special = tokenizer.backend.id_to_token, tokenizer.special
        byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self.decoder = _Bytes() if byte_level else _Window(tokenizer, prompt)

    def push(self, id: int) -> str:
        token = self.token(id)
        if token is None or token in self.special:  # no text, which would make a window grow without end
            return ""
        return self.decoder.push(id, token)

    def flush(self) -> str:
        return self.decoder.flush()


class _Bytes:
    """Byte-level tokens are bytes, so the standard library's incremental decoder is exact."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int, token: str) -> str:
        try:
            return self.decoder.decode(bytes(BYTE_OF[character] for character in token))
        except KeyError:  # a token added by hand is spelt as it is
            return self.decoder.decode(token.encode())

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class _Window:
    """Any other decoder may look at a token's neighbours: each piece is decoded after the one that left before it."""

    LONGEST = 4  # bytes of a character: after as many tokens, what is not whole never will be

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.decode = tokenizer.decode
        self.context, self.pending = list(prompt), list[int]()
        self.before = self.decode(self.context)

    def push(self, id: int, token: str) -> str:
        self.pending.append(id)
        text = self.decode(self.context + self.pending)
        if text.endswith("\ufffd") and len(self.pending) < self.LONGEST:
            return ""
        return self._leave(text)

    def flush(self) -> str:
        return self._leave(self.decode(self.context + self.pending))

    def _leave(self, text: str) -> str:
        whole = text.startswith(self.before)  # else broken bytes made the context itself read differently
        piece = text[len(self.before) :] if whole else self.decode(self.pending)
        self.context = self.pending if piece else self.context + self.pending
        self.pending = []
        self.before = self.decode(self.context)
        return piece


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table (Radford et al. 2019, encoder.py): printable bytes stand for themselves, the rest follow 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()
