"""What a sequence's numbers depend on beside its own tokens: who else is in the batch, its place, padding, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from isoforward.base.errors import BadInput
from isoforward.base.results import Row
from isoforward.base.vocabulary import Condition
from isoforward.measure.case import Case
from isoforward.measure.mismatch import decoded_logits, missing_row, row
from isoforward.model.gpt import GPT

BATCHES = (4, 16, 64)  # that a sequence is decoded in
PADDING = 3  # positions at the left of one


def company_rows(case: Case, model: GPT, texts: Tensor, *, exact: bool, way: str) -> Iterator[Row]:
    """How many logits of the first of texts (64, T) change with each of `changes`; why, where one is not to be had."""
    logits = (texts.shape[1] - 1) * case.model.vocabulary
    for change, differing in changes(model, texts, exact=exact).items():
        about: dict[str, Condition] = {"way": way, "change": change, "logits": logits}
        try:
            yield row(case, "moved by company", float(differing()), about)
        except BadInput as refusal:
            yield missing_row(case, "moved by company", refusal, about)


def changes(model: GPT, texts: Tensor, *, exact: bool) -> dict[str, Callable[[], int]]:
    """By what is changed, what counts the logits of the first text that change with it; the others are its company."""
    decoded = partial(decoded_logits, model, exact=exact)
    alone, pair = decoded(texts[:1])[0], decoded(texts[:2])[0]
    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2

    def in_batch(batch: int) -> int:
        return differing(decoded(texts[:batch])[0], alone)

    def at_another_place() -> int:
        return differing(decoded(texts[:2].flip(0))[1], pair)

    def padded() -> int:
        beside = torch.cat((texts[:2, :1].expand(2, PADDING), texts[:2, :-PADDING]), dim=1)
        own = decoded(beside, padding=torch.full((2,), PADDING))[0, PADDING:]
        return differing(own, pair[: len(own)])

    def by_other_threads() -> int:
        try:
            torch.set_num_threads(other)
            return differing(decoded(texts[:1])[0], alone)
        finally:
            torch.set_num_threads(threads)

    return {
        **{f"batch {batch}": partial(in_batch, batch) for batch in BATCHES},
        "place in the batch": at_another_place,
        "left padding": padded,
        f"threads, {other} for {threads}": by_other_threads,
    }


def differing(one: Tensor, other: Tensor) -> int:
    return int((one != other).sum())
