"""Which kernels make serving's numbers others than training's.

Exact decoding (serve/exact.py) has training's bits. Putting one of serving's usual kernels into it at a time shows what
that kernel moves, since nothing else is changed. What exact decoding does as serving does it, norms and casts for
example, moves exact decoding itself away from training; each of these alone is put into training's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoforward.formats.export import freeze
from isoforward.measure.mismatch import decoded_logits, exactly, forward_logits, logprobs_of
from isoforward.model.gpt import GPT, Linear
from isoforward.model.kernels import Attends, Kernels, use_kernels
from isoforward.serve.decoding import room_for

REST = "all else"  # norms, activations, positions, casts: exact decoding runs them as serving does
Swap = Callable[[GPT], object]  # puts one of serving's kernels into a model


def ladder(master: GPT, rows: int, kernels: Kernels, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """By kernel of serving, the mean difference of log-probabilities that it alone makes, in nat.

    `rows` is what `exact.fewest_rows` gave, `kernels` are those of small products. Texts go one by one.
    """

    def trained(model: GPT) -> Tensor:
        return logprobs_of([each[:-1] for each in forward_logits(model, texts)], texts, [1] * len(texts))

    def decoded(swap: Swap) -> Tensor:
        model = exactly(master, rows)
        swap(model)
        found = [decoded_logits(model, torch.tensor([text]), exact=True)[0] for text in texts]
        return logprobs_of(found, texts, [1] * len(texts))

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().mean())

    training, exact = trained(master), decoded(lambda model: None)
    found = {REST: apart(exact, training)}
    found |= {name: apart(decoded(swap), exact) for name, swap in in_decoding(kernels).items()}
    found["casts"] = apart(trained(freeze(master)), training)  # once, where training casts in every forward
    for name, swap in IN_TRAINING.items():
        model = deepcopy(master)
        swap(model)
        found[name] = apart(trained(model), training)
    return found


def culprits(found: Mapping[str, float]) -> list[str]:
    """Whatever moves a number, the most first; all else only where none of its parts is one of them."""
    named = sorted((name for name, share in found.items() if share), key=found.__getitem__, reverse=True)
    return [name for name in named if name != REST or not {"casts", *IN_TRAINING} & set(named)]


# Serving's kernels that are others than training's, for exact decoding


def in_decoding(kernels: Kernels) -> dict[str, Swap]:
    swaps: dict[str, Swap] = {"products": usual_products, "head": usual_head, "attention": usual_attention}
    if kernels:
        swaps["chosen products"] = lambda model: use_kernels(model, kernels)
    return swaps


def usual_products(model: GPT) -> None:
    for layer in linears(model.blocks):
        layer.few_rows = {}


def usual_head(model: GPT) -> None:
    model.unembedding.few_rows = {}


def usual_attention(model: GPT) -> None:
    for block in model.blocks:
        block.get_submodule("attention").attend = over_what_is_there  # type: ignore[assignment]  # torch says Module


def over_what_is_there(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """As usual decode asks it: q (B, H, T, D) as it is, and no slot that all of its rows mask."""
    seen = int(attn_mask[0, 0, -1].sum())
    mask = None if q.shape[2] == 1 else attn_mask[..., :seen]
    return F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, enable_gqa=enable_gqa)


def linears(module: nn.Module) -> Iterator[Linear]:
    return (layer for layer in module.modules() if isinstance(layer, Linear))


# What exact decoding does as serving does it, for training's forward


def norms_by_position(model: GPT) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.forward = partial(by_position, module.forward)  # type: ignore[method-assign]  # of this copy alone


def by_position(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x (B, T, ...), every position by itself."""
    return torch.cat([forward(x[:, at : at + 1]) for at in range(x.shape[1])], dim=1)


def keys_of_cache(model: GPT) -> None:
    held = room_for(model, batch=1, capacity=1).keys[0].dtype
    for module in model.modules():
        if isinstance(module, Attends):
            module.attend = partial(attend_held, module.attend or F.scaled_dot_product_attention, held)


def attend_held(
    attend: Callable[..., Tensor], held: torch.dtype, q: Tensor, k: Tensor, v: Tensor, **how: object
) -> Tensor:
    """With keys and values as a cache of dtype `held` gives them back."""
    return attend(q, k.to(held).to(q.dtype), v.to(held).to(q.dtype), **how)


IN_TRAINING: Mapping[str, Swap] = MappingProxyType({"norms": norms_by_position, "cache dtype": keys_of_cache})
