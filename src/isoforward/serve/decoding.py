"""The loop that turns forward passes into tokens: a prompt's forward, then one more for every token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.base import units
from isoforward.base.device import device_of
from isoforward.base.errors import BadInput
from isoforward.model.footprint import kv_bytes
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.steps import decode, decode_uncached, prefill
from isoforward.serve.compiled import StaticKVCache, compiled_decode
from isoforward.serve.exact import ExactKVCache, padded_length

FEW = 512  # tokens that nearly always hold the mass that top_p asks for
COMPILED_FOR = 256  # positions: a step is compiled for each capacity anew, so that few of them should differ


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What was said already is penalised first; then temperature, then the `top_k` likeliest, then the fewest whose
    probabilities reach `top_p`.
    """

    temperature: float = 0.8  # 0: the likeliest token
    repetition_penalty: float = 1.0  # 1: none
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234

    def penalised(self, logits: Tensor, said: Tensor) -> Tensor:
        """logits (B, V) after the tokens `said` (B, T): Keskar 2019, section 4.1, the penalty once for each token.

        As Transformers has it, it divides what is positive and multiplies what is negative.
        """
        if self.repetition_penalty == 1:
            return logits
        score = logits.gather(-1, said)
        less = torch.where(score < 0, score * self.repetition_penalty, score / self.repetition_penalty)
        return logits.scatter(-1, said, less)

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, V) to token ids (B,)"""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities, ids = self.candidates(logits)
        drawn = draw(probabilities, generator)
        return drawn if ids is None else ids.gather(-1, drawn[:, None]).squeeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits (..., V) to what each token is drawn with, (..., V)"""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        probabilities, ids = self.candidates(logits)
        if ids is None:
            return probabilities
        return probabilities.new_zeros(logits.shape).scatter(-1, ids, probabilities)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What can be drawn at all from logits (..., V): the probabilities (..., n), and the ids that have them.

        No ids mean every token in turn. Of a large vocabulary a few are left early, so that sampling costs little.
        """
        logits, ids = logits.float() / self.temperature, None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k)
        probabilities = logits.softmax(-1)
        if self.top_p in (None, 1):
            return probabilities, ids
        probabilities, likeliest = nucleus(probabilities, self.top_p)
        return probabilities, likeliest if ids is None else ids.gather(-1, likeliest)


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of (..., V) that reach `top_p`, scaled to 1, and which they are; both (..., n), likeliest first.

    Where rows need unlike numbers, the rest of the shorter is 0. All of the vocabulary is sorted only where few of it
    do not reach.
    """
    V = probabilities.shape[-1]
    for size in (min(V, FEW), V):
        likeliest, ids = probabilities.topk(size)
        before = likeliest.cumsum(-1) - likeliest
        if size == V or bool((before[..., -1] >= top_p).all()):
            break
    kept = likeliest.masked_fill(before >= top_p, 0.0)
    return kept / kept.sum(-1, keepdim=True), ids


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """probabilities (B, n) to places (B,): where one uniform number falls in their sum; torch.multinomial takes n."""
    sums = probabilities.double().cumsum(-1)
    uniform = torch.rand(len(sums), 1, dtype=torch.double, device=sums.device, generator=generator)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass of the generation loop, for the rows (sequences) still under way."""

    rows: list[int]
    tokens: list[int]  # the one chosen, a row each; of speculative decoding those that one row gained
    context: int  # positions that the forward could see, those of the longest row
    time_s: float
    logits: Tensor  # (B, V), the model's own
    scores: Tensor  # (B, V), what each token was chosen from: logits after the repetition penalty


def refuse_unservable(model: GPT, prompts: Sequence[Sequence[int]]) -> None:
    if min(map(len, prompts)) == 0:
        raise BadInput("the prompt is empty and the tokenizer has no end-of-text token to start from")
    if (longest := max(map(len, prompts))) > model.config.context:
        raise BadInput(f"the prompt has {longest} tokens and the model's context holds {model.config.context}")


def refuse_non_finite(model: GPT, logits: Tensor) -> None:
    """Logits (..., V) that no token can be drawn from: the largest is then NaN or infinite."""
    if logits.max().isfinite():
        return
    name = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if name is not None:
        raise BadInput(f"the logits are not finite, since the model's {name} is not; take an earlier checkpoint")
    told = str(model.dtype).removeprefix("torch.")
    raise BadInput(
        f"the logits are not finite, though all weights are: {told} is too narrow for this model's activations"
    )


def room_for(model: GPT, *, batch: int, capacity: int, padding: Tensor | None = None, exact: bool = False) -> KVCache:
    """An empty cache, or BadInput where it would take more memory than there is."""
    device = model.embedding.weight.device
    capacity = model.config.context if exact else capacity
    needed = model.dtype.itemsize * kv_bytes(model.config, batch=batch, length=capacity, dtype="int8")
    free = device_of(device).free_bytes()
    if free is not None and needed > free:
        raise BadInput(
            f"the KV cache of {batch} x {capacity} positions takes {units.size(needed)} and {units.size(free)} "
            "are free; serve fewer prompts at once, or write a smaller max_new_tokens"
        )
    if exact:
        assert padding is not None
        return ExactKVCache(model.config, batch=batch, dtype=model.dtype, padding=padding)
    return KVCache(model.config, batch=batch, capacity=capacity, dtype=model.dtype, device=device, padding=padding)


def forward_passes(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    ends: Collection[int] = (),
    cache: bool = True,
    compile: bool = False,
    exact: int = 0,
) -> Iterator[Pass]:
    """The whole of inference: a forward over the prompts, then a forward a token until each row has ended.

    Rows of unlike lengths are padded at the left. A row ends with one of `ends`, with `max_new_tokens`, or where its
    own tokens fill the context; ended rows leave the batch, and so does padding that no row left needs. Prompts longer
    than the context, and a cache larger than memory, raise BadInput before anything runs. `exact` is what
    `exact.use_exact` gave for the model: its logits then have the bits of training's forward.
    """
    refuse_unservable(model, prompts)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if exact:
        longest = padded_length(longest, exact, model.config.context)
    spare = longest - max(lengths)  # padding of every row
    device = model.embedding.weight.device
    padding = None
    if min(lengths) < longest or exact:
        padding = torch.tensor([longest - length for length in lengths], device=device)
    tokens = torch.tensor([[p[0]] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    steps = min(max_new_tokens, model.config.context - min(lengths) + 1)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    past = None
    if cache or padding is not None:
        capacity = longest + steps
        if compile:
            capacity = math.ceil(capacity / COMPILED_FOR) * COMPILED_FOR
        capacity = min(capacity, model.config.context)
        past = room_for(model, batch=len(prompts), capacity=capacity, padding=padding, exact=exact > 0)
    one_more: Callable[..., Tensor] = compiled_decode(device.type) if compile else decode
    chosen = tokens[:, -1]
    rows = list(range(len(prompts)))
    for step in range(steps):
        start = time.perf_counter()
        if past is None:
            logits = decode_uncached(model, tokens)
        elif not cache:  # padded rows need the cache's mask and positions; emptied, it saves nothing
            past.length = 0
            logits = prefill(model, tokens, past)
        elif step == 0:
            logits = prefill(model, tokens, past)
            if compile:
                past = StaticKVCache(past)
        else:
            logits = one_more(model, chosen[:, None], past)  # not cut from `tokens`, whose strides grow with it
        refuse_non_finite(model, logits)
        scores = sampling.penalised(logits, tokens)
        chosen = sampling.choose(scores, generator)
        ids = chosen.tolist()
        seen, spent_s = tokens.shape[1] - spare, time.perf_counter() - start
        yield Pass(rows=rows, tokens=ids, context=seen, time_s=spent_s, logits=logits, scores=scores)
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        full = model.config.context
        going = [i for i, token in enumerate(ids) if token not in ends and lengths[rows[i]] + step < full]
        if not going:
            return
        if len(going) < len(rows):
            keep = torch.tensor(going, device=device)
            tokens, chosen, rows = tokens[keep], chosen[keep], [rows[i] for i in going]
            if past is not None:
                past.keep(keep)
                tokens, spare = tokens[:, past.unpad() :], 0
