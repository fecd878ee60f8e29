"""What came of a training: the same numbers for the log, the card, the rows and W&B."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from isoforward.base.results import Row, RowFields, row_of, unavailable
from isoforward.train.pace import told_loss


@dataclass(frozen=True, kw_only=True)
class Outcome:
    steps: int  # taken, those before a resume among them
    tokens_per_step: int
    loss: float | None  # nats a token of the text held out, after the last step; None where it was not validated
    judged_tokens: int
    bytes_per_token: float | None  # of those
    tokens_per_s: float | None
    ended_by: str | None = None  # what ended it before its last step

    @property
    def bits_per_byte(self) -> float | None:
        if self.loss is None or self.bytes_per_token is None:
            return None
        return self.loss / math.log(2) / self.bytes_per_token

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else math.exp(min(self.loss, 700.0))

    def numbers(self) -> Mapping[str, float]:
        """Those that are known."""
        every = {
            "steps": float(self.steps),
            "validation_loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "tokens_per_s": self.tokens_per_s,
        }
        return {name: value for name, value in every.items() if value is not None}

    def told_loss(self) -> str:
        if self.loss is None:
            return "not validated"
        return told_loss(self.loss, self.bits_per_byte) + f", perplexity {self.perplexity:.4g}"

    def told_steps(self) -> str:
        rate = "" if self.tokens_per_s is None else f", {self.tokens_per_s:,.0f} tokens/s"
        return f"{self.steps:,} steps{f', ended by {self.ended_by}' if self.ended_by else ''}{rate}"

    def rows(self, environment: str, *, text: str) -> Iterator[Row]:
        """`text` is what the corpus is known by."""
        about: RowFields = {"life": "training", "phase": "run", "environment": environment}
        about["conditions"] = {"step": self.steps, "text": text, "held_out_tokens": self.judged_tokens}
        yield known(self.loss, "it was not validated", about, "loss", per="token")
        if self.bits_per_byte is not None:
            yield row_of("train", about, quantity="bits_per_byte", per="run", value=self.bits_per_byte)
        few = "a single step, which loads libraries, tells no rate"
        yield known(self.tokens_per_s, few, about, "throughput", per="run")


def known(value: float | None, why_not: str, about: RowFields, quantity: str, per: str) -> Row:
    if value is None:
        missing = unavailable(why_not)
        return row_of("train", about, missing, quantity=quantity, per=per)
    return row_of("train", about, value=value, quantity=quantity, per=per)
