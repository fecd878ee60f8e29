"""What one prompt gains, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from isoforward.data.streaming import Stream
from isoforward.data.tokenizer import Tokenizer


class Continuation:
    """Text leaves once its characters are whole and it cannot be the beginning of `stop` any more.

    `finished` says why nothing more is taken: "end" for an end-of-text token, "stop" for the text asked for.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, stop: str | None = None) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.pieces: list[str] = []  # the text that each token completed; together they may go beyond `stop`
        self.logprobs: list[float | None] = []
        self.text = ""
        self.finished: str | None = None
        self.stop, self.ends = stop, tokenizer.ends
        self.stream = Stream(tokenizer, prompt)
        self.held = ""  # text that may be the beginning of `stop`

    def add(self, token: int, logprob: float | None = None) -> str:
        """The text that may leave now."""
        if self.finished:
            return ""
        piece = "" if token in self.ends else self.stream.push(token)
        self.tokens.append(token)
        self.pieces.append(piece)
        self.logprobs.append(logprob)
        if token in self.ends:
            self.finished = "end"
        return self._leave(piece)

    def close(self) -> str:
        """The rest of the text, whole or not."""
        if self.finished == "stop":
            return ""
        rest = self.stream.flush()
        if self.pieces:
            self.pieces[-1] += rest
        return self._leave(rest, last=True)

    def fills(self, context: int) -> bool:
        """Nothing but the context ended it: its last token came from the last position."""
        return not self.finished and len(self.prompt) + len(self.tokens) > context

    def _leave(self, piece: str, *, last: bool = False) -> str:
        self.held += piece
        if self.stop and self.stop in self.held:
            self.finished, ready = "stop", self.held.partition(self.stop)[0]
            self.held = ""
        else:
            cut = len(self.held) - (0 if last else overlap(self.held, self.stop))
            ready, self.held = self.held[:cut], self.held[cut:]
        self.text += ready
        return ready


def overlap(text: str, stop: str | None) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    if not stop:
        return 0
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
