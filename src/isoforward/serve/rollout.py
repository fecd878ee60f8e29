"""Answers for a policy to learn from: sampled by serving's own steps, with the log-probabilities they were drawn by."""

from __future__ import annotations

import torch
from torch import Tensor

from isoforward.model.gpt import GPT
from isoforward.model.grpo import Rollout
from isoforward.model.steps import Phase, decode, prefill, unmeasured
from isoforward.serve.decoding import draw, room_for


@torch.no_grad()  # not inference_mode, whose tensors no backward may keep
def roll_out(
    model: GPT, prompts: Tensor, *, new_tokens: int, generator: torch.Generator, phase: Phase = unmeasured
) -> Rollout:
    """Prompts (B, P) of one length to answers of one length, drawn from the model's own distribution.

    No answer ends early: with lengths that differ a step would cost what its longest answer does.
    """
    batch, length = prompts.shape
    with phase("prefill"):
        cache = room_for(model, batch=batch, capacity=length + new_tokens)
    logits = prefill(model, prompts, cache, phase=phase)
    tokens, logprobs = [prompts], []
    for step in range(new_tokens):
        if step:
            logits = decode(model, tokens[-1], cache, phase=phase)
        with phase("sampling"):
            scores = logits.float().log_softmax(-1)
            chosen = draw(scores.exp(), generator)[:, None]  # (B, 1)
            tokens.append(chosen)
            logprobs.append(scores.gather(-1, chosen))
    with phase("sampling"):
        return Rollout(tokens=torch.cat(tokens, dim=1), logprobs=torch.cat(logprobs, dim=1))
