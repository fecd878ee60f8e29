"""Answers for a policy to learn from: sampled by serving's own steps, with the log-probabilities they were drawn by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.model.gpt import GPT
from isoforward.model.grpo import Rollout
from isoforward.model.steps import Phase, decode, prefill, unmeasured
from isoforward.serve.decoding import draw, room_for
from isoforward.serve.exact import padded_length


@torch.no_grad()  # not inference_mode, whose tensors no backward may keep
def roll_out(
    model: GPT,
    prompts: Tensor,
    *,
    new_tokens: int,
    generator: torch.Generator,
    exact: int = 0,
    phase: Phase = unmeasured,
) -> Rollout:
    """Prompts (B, P) of one length to answers of one length, drawn from the model's own distribution.

    No answer ends early: with lengths that differ a step would cost what its longest answer does. `exact` is what
    `exact.use_exact` gave for the model: log-probabilities are then those of training's forward over sequences as long
    as the context, bit for bit.
    """
    batch, length = prompts.shape
    with phase("prefill"):
        padding, read = None, prompts
        if exact:
            missing = padded_length(length, exact, model.config.context) - length
            padding, read = torch.full((batch,), missing), F.pad(prompts, (missing, 0))
        capacity = length + new_tokens - 1  # the last token is read by nobody
        cache = room_for(model, batch=batch, capacity=capacity, padding=padding, exact=exact > 0)
    logits = prefill(model, read, cache, phase=phase)
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
