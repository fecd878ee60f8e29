"""What training does and what serving does, side by side.

    training    forward  loss  backward  optimizer      every position at once, all of it kept for backward
    inference   forward                                 every position of the prompt at once (prefill), then
                forward                                 one position at a time on what the cache kept (decode)

Both lives call the same `model`. Whoever wants to know what a phase costs passes `phase`; nothing here knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isoforward.model.gpt import GPT, KVCache
from isoforward.model.loss import next_token_loss

Phase = Callable[[str], AbstractContextManager[object]]
Cache = TypeVar("Cache", contravariant=True)

_nothing = nullcontext()


class Decoder(Protocol[Cache]):
    """A model that serves, and the kind of cache that it fills: ours, or one that is wrapped."""

    def __call__(self, tokens: Tensor, /) -> Tensor: ...
    def trunk(self, tokens: Tensor, cache: Cache | None = None) -> Tensor: ...
    def head(self, x: Tensor, /) -> Tensor: ...


def unmeasured(name: str) -> AbstractContextManager[object]:
    return _nothing


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    tokens: object,
    targets: object,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    criterion: Callable[..., Tensor] = next_token_loss,
    backward: Callable[[Tensor], object] = Tensor.backward,
    synchronise: Callable[[nn.Module], object] | None = None,
    phase: Phase = unmeasured,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on tokens, targets (B, T), cut into `accumulate` micro-batches.

    Gives the loss and the norm of the gradient before clipping, both (). A gradient that is not finite raises
    RuntimeError before the weights are touched. Left whole (accumulate=1), tokens and targets may be whatever model and
    criterion take.
    """
    losses = []
    for x, y in zip(micro_batches(tokens, accumulate), micro_batches(targets, accumulate), strict=True):
        with phase("forward"):
            logits = model(x)  # (B, T, V)
        with phase("loss"):
            loss = criterion(logits, y) / accumulate  # ()
            del logits
        with phase("backward"):
            backward(loss)
        losses.append(loss.detach())
    if synchronise is not None:  # gradients with other processes, where backward has not done that
        with phase("communication"):
            synchronise(model)
    with phase("optimizer"):
        norm = nn.utils.clip_grad_norm_(
            model.parameters(), float("inf") if clip is None else clip, error_if_nonfinite=True
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(losses, torch.zeros_like(losses[0])), norm


def micro_batches(batch: object, count: int) -> Sequence[object]:
    if count == 1:
        return (batch,)
    assert isinstance(batch, Tensor)
    return batch.chunk(count)


@torch.inference_mode()
def prefill(model: Decoder[Cache], tokens: Tensor, cache: Cache, *, phase: Phase = unmeasured) -> Tensor:
    """The prompt (B, T) in one forward; logits of its last position, (B, V): serving needs no other."""
    with phase("prefill"):
        return model.head(model.trunk(tokens, cache)[:, -1])


@torch.inference_mode()
def decode(model: Decoder[Cache], token: Tensor, cache: Cache, *, phase: Phase = unmeasured) -> Tensor:
    """One more token (B, 1) in one forward over the cached past; logits of the next, (B, V)."""
    with phase("decode"):
        return model.head(model.trunk(token, cache)[:, -1])


@torch.inference_mode()
def verify(model: GPT, tokens: Tensor, cache: KVCache, *, phase: Phase = unmeasured) -> Tensor:
    """Several tokens (B, T) in one forward over the cached past; logits after each of them, (B, T, V)."""
    with phase("decode"):
        return model(tokens, cache)  # type: ignore[no-any-return]


@torch.inference_mode()
def decode_uncached(model: Decoder[Cache], tokens: Tensor, *, phase: Phase = unmeasured) -> Tensor:
    """The same logits (B, V) with nothing kept: the whole text so far (B, T) goes through the forward again."""
    with phase("decode"):
        return model.head(model.trunk(tokens)[:, -1])
