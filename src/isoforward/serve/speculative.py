"""Speculative decoding: a small model proposes, the large one checks all proposals in one forward.

What is drawn has exactly the large model's distribution (Leviathan 2023, theorem in section 3.1; Chen 2023). At a
temperature of 0 it is the large model's greedy text, up to ties: a forward over several rows may round otherwise in the
last bits than one over a single row. Exact serving (serve/exact.py) has no such ties.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from isoforward.base.errors import BadInput
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.steps import prefill, verify
from isoforward.serve.decoding import Pass, Sampling, draw, refuse_non_finite, refuse_unservable, room_for


def speculative_passes(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    draft: GPT,
    draft_tokens: int,
    max_new_tokens: int,
    sampling: Sampling,
    ends: Collection[int] = (),
    cache: bool = True,
    exact: int = 0,
) -> Iterator[Pass]:
    """As `decoding.forward_passes` for one prompt; a pass of `model` gives 1 to `draft_tokens` + 1 tokens.

    Under `exact`, every pass has rows in multiples of it: the prompt is padded at the left, and a later pass reads
    some of the text again, which gives the same bits in the same slots. The draft proposes as usual.
    """
    refuse_unservable(model, prompts)
    if len(prompts) != 1 or not cache or sampling.repetition_penalty != 1:
        raise BadInput("a draft serves one prompt at a time, with a cache and without a repetition penalty")
    prompt = list(prompts[0])
    padding = min(-len(prompt) % exact, model.config.context - len(prompt)) if exact else 0
    text = prompt[:1] * padding + prompt
    end_at = min(len(text) + max_new_tokens, padding + model.config.context + 1)
    positions = end_at - padding - 1  # the last token is never fed
    if positions > draft.config.context:
        raise BadInput(
            f"draft: {positions} positions do not fit its context of {draft.config.context}; "
            "write a smaller max_new_tokens"
        )
    at_left = torch.tensor([padding]) if exact else None
    held = room_for(model, batch=1, capacity=positions, padding=at_left, exact=exact > 0)
    drafted = room_for(draft, batch=1, capacity=positions)
    generator = torch.Generator(model.embedding.weight.device).manual_seed(sampling.seed)
    while len(text) < end_at:
        start = time.perf_counter()
        # the prompt alone has no past; under exact, padding is not read again beside proposals
        past = held.length > padding + exact
        room = min(draft_tokens, end_at - len(text) - 1) if past else 0
        proposals, chances = propose(draft, text[padding:], drafted, room, sampling, generator)
        if exact and held.length:
            held.rewind(held.length - (held.length - len(text) - room) % exact)
        logits = verify(model, ids_of(model, [*text[held.length :], *proposals]), held)[0, -room - 1 :]  # (room + 1, V)
        refuse_non_finite(model, logits)
        gained = accept(sampling.probabilities(logits), chances, proposals, generator)
        seen = len(text) - padding + room
        held.length = len(text) + len(gained) - 1
        drafted.length = min(drafted.length, held.length - padding)
        text += gained
        last = next((i for i, token in enumerate(gained) if token in ends), None)
        gained = gained if last is None else gained[: last + 1]
        spent_s, logits = time.perf_counter() - start, logits[: len(gained)]
        rows = [0] * len(gained)
        yield Pass(rows=rows, tokens=gained, context=seen, time_s=spent_s, logits=logits, scores=logits)
        if last is not None:
            return


def propose(
    draft: GPT, text: list[int], cache: KVCache, count: int, sampling: Sampling, generator: torch.Generator
) -> tuple[list[int], list[Tensor]]:
    """`count` tokens to follow `text`, and what each was drawn from, (V,). The cache takes in what it lacks of both."""
    proposals: list[int] = []
    chances: list[Tensor] = []
    for _ in range(count):
        lacking = [*text, *proposals][cache.length :]
        logits = prefill(draft, ids_of(draft, lacking), cache)  # (1, V)
        refuse_non_finite(draft, logits)
        probabilities = sampling.probabilities(logits)
        proposals.append(int(draw(probabilities, generator)))
        chances.append(probabilities[0])
    return proposals, chances


def accept(wanted: Tensor, chances: list[Tensor], proposals: list[int], generator: torch.Generator) -> list[int]:
    """Leviathan 2023, algorithm 1: the proposals up to the first refused one, and one token more.

    `wanted` (n + 1, V) is what the large model draws from after each of n proposals. A proposal x stays with
    probability min(1, wanted(x) / chance(x)); in a refused one's place stands a draw from the positive part of
    wanted - chance.
    """
    for i, (token, chance) in enumerate(zip(proposals, chances, strict=True)):
        uniform = torch.rand((), device=wanted.device, generator=generator)
        if uniform * chance[token] >= wanted[i, token]:
            left = (wanted[i] - chance).clamp(min=0)
            instead = left if left.any() else wanted[i]  # of equals, that differ by their rounding alone
            return [*proposals[:i], int(draw(instead[None], generator))]
    return [*proposals, int(draw(wanted[-1:], generator))]


def ids_of(model: GPT, tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device=model.embedding.weight.device)
