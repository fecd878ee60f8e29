"""Which kernels make serving's numbers others than training's, and what a sequence's numbers depend on.

Exact decoding (serve/exact.py) has training's bits. Putting one of serving's usual kernels into it at a time shows the
share of each: what differs then differs by that kernel alone. What exact decoding does as serving does is put into
training's forward in the same way.
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
from isoforward.measure.mismatch import logprobs_of, trained_logits
from isoforward.model.gpt import GPT, KVCache, Linear
from isoforward.model.kernels import Attends, Kernels, use_kernels
from isoforward.model.steps import decode
from isoforward.serve.decoding import room_for
from isoforward.serve.exact import ExactKVCache, use_exact

REST = "all else"  # norms, activations, positions, casts: exact decoding runs them as serving does
Swap = Callable[[GPT], object]  # puts one of serving's kernels into an exact model

BATCHES = (4, 16, 64)  # that a sequence is decoded in
PADDING = 3  # positions at the left of one


def forced(model: GPT, texts: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, T - 1, V) after each token of texts (B, T) but the last, every one of them decoded from the cache."""
    found = [decode(model, texts[:, at : at + 1], cache) for at in range(texts.shape[1] - 1)]
    return torch.stack(found, dim=1)


def usual_cache(model: GPT, texts: Tensor, padding: Tensor | None = None) -> KVCache:
    return KVCache(model.config, batch=len(texts), capacity=texts.shape[1], dtype=model.dtype, padding=padding)


def exact_cache(model: GPT, texts: Tensor, padding: Tensor | None = None) -> KVCache:
    none = torch.zeros(len(texts), dtype=torch.long)
    return ExactKVCache(model.config, batch=len(texts), dtype=model.dtype, padding=none if padding is None else padding)


# One kernel at a time


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


def usual_kernels(kernels: Kernels) -> dict[str, Swap]:
    """Those of serving that are others than training's, `kernels` of small products among them."""
    swaps: dict[str, Swap] = {"products": usual_products, "head": usual_head, "attention": usual_attention}
    if kernels:
        swaps["chosen products"] = lambda model: use_kernels(model, kernels)
    return {REST: lambda model: None, **swaps}


def shares(master: GPT, swaps: Mapping[str, Swap], texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean difference of log-probabilities from training's, in nat, with each swap alone. Texts go one by one."""
    starts = [1] * len(texts)
    trained = [each[:-1] for each in trained_logits(master, texts)]
    wanted = logprobs_of(trained, texts, starts)
    found = {}
    for name, swap in swaps.items():
        model = freeze(master)
        use_exact(model)
        swap(model)
        each = (torch.tensor([text]) for text in texts)
        served = [forced(model, text, exact_cache(model, text))[0] for text in each]
        found[name] = float((logprobs_of(served, texts, starts) - wanted).abs().mean())
    return found


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


OF_THE_REST: Mapping[str, Swap] = MappingProxyType({"norms": norms_by_position, "cache dtype": keys_of_cache})


def shares_of_the_rest(master: GPT, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """As `shares`, of what exact decoding does as serving does: each alone in training's forward."""
    starts = [1] * len(texts)
    models = {"casts": freeze(master)}  # once, where training casts in every forward
    for name, swap in OF_THE_REST.items():
        models[name] = deepcopy(master)
        swap(models[name])
    wanted, *others = (
        logprobs_of([each[:-1] for each in trained_logits(model, texts)], texts, starts)
        for model in (master, *models.values())
    )
    return {name: float((found - wanted).abs().mean()) for name, found in zip(models, others, strict=True)}


def culprits(found: Mapping[str, float]) -> list[str]:
    """Whatever has a share, the largest first."""
    return sorted((name for name, share in found.items() if share), key=found.__getitem__, reverse=True)


# Whatever else is in the batch


def differing(model: GPT, texts: Tensor, cache_of: Callable[..., KVCache]) -> Iterator[tuple[str, int]]:
    """By what is changed, how many logits of the first text (T,) change with it; texts (64, T) are its company."""

    def decoded(tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        return forced(model, tokens, cache_of(model, tokens, padding))

    alone = decoded(texts[:1])[0]
    for batch in BATCHES:
        yield f"batch {batch}", int((decoded(texts[:batch])[0] != alone).sum())
    pair = decoded(texts[:2])[0]
    yield "place in the batch", int((decoded(texts[:2].flip(0))[1] != pair).sum())
    padded = torch.cat((texts[:2, :1].expand(2, PADDING), texts[:2, :-PADDING]), dim=1)
    beside = decoded(padded, torch.full((2,), PADDING))[0, PADDING:]
    yield "left padding", int((beside != pair[: len(beside)]).sum())
    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2
    try:
        torch.set_num_threads(other)
        again = decoded(texts[:1])[0]
    finally:
        torch.set_num_threads(threads)
    yield f"threads, {other} for {threads}", int((again != alone).sum())
