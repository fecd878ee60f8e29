"""How far the log-probabilities that serving gives are from those of training's forward, on the tokens it sampled.

An engine samples from its own numbers and training learns from its own; both should be the same policy. Serving is
taken as it is used: it samples, and gives the log-probability of each token. Training's forward then reads the same
texts, padded at the right to the model's context, which causal attention does not see. A forward in fp64 says which of
the two is nearer to the exact numbers. Ways of serving are in ways.py, who makes the difference in culprits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isoforward.base.results import Row, RowFields, unavailable
from isoforward.base.vocabulary import Condition
from isoforward.formats.export import freeze
from isoforward.measure.case import Case
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.steps import decode
from isoforward.serve.decoding import Pass, Sampling, forward_passes, room_for
from isoforward.serve.exact import use_exact

CLIP = 0.2  # of PPO (Schulman 2017) and GRPO: ratios beyond 1 +- this are cut
QUANTILES = {"median": 0.5, "99 %": 0.99}
CLOSE_TOKENS = 64  # served for a training's report
AT_ONCE = 4  # texts that one forward reads

Passes = Callable[..., Iterator[Pass]]


@dataclass(frozen=True, kw_only=True)
class Served:
    """Texts, each `prompts` tokens that were given and then those that were sampled, with their log-probabilities."""

    prompts: list[int] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # (new, V) each; none where an engine keeps them

    def add(self, prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        self.prompts.append(len(prompt))
        self.texts.append([*prompt, *tokens])
        self.logprobs.append(list(logprobs))

    def add_logits(self, prompt: Sequence[int], tokens: Sequence[int], logits: Tensor) -> None:
        chances = logits.double().log_softmax(-1)
        self.add(prompt, tokens, [float(row[token]) for row, token in zip(chances, tokens, strict=True)])
        self.logits.append(logits)

    def first(self, count: int) -> Served:
        """Of so many texts."""
        return Served(
            prompts=self.prompts[:count],
            texts=self.texts[:count],
            logprobs=self.logprobs[:count],
            logits=self.logits[:count],
        )

    def own(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Of logits after every token of each text, those that a sampled one was or would have been drawn from."""
        return [each[start - 1 : -1] for each, start in zip(logits, self.prompts, strict=True)]


def serve(
    passes: Passes,
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    seed: int,
    new_tokens: int,
    temperature: float = 1.0,
) -> Served:
    """`batch` prompts at a time."""
    served = Served()
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        tokens: list[list[int]] = [[] for _ in some]
        logits: list[list[Tensor]] = [[] for _ in some]
        sampling = Sampling(temperature=temperature, seed=seed + start)
        for step in passes(model, some, max_new_tokens=new_tokens, sampling=sampling):
            for row, token, scores in zip(step.rows, step.tokens, step.logits, strict=True):
                tokens[row].append(token)
                logits[row].append(scores)
        for prompt, its, scores in zip(some, tokens, logits, strict=True):
            served.add_logits(prompt, its, torch.stack(scores))
    return served


def forward_logits(model: GPT, texts: Sequence[Sequence[int]], *, length: int | None = None) -> list[Tensor]:
    """Logits after every token of each text, (T, V) each, by one forward over texts padded to `length`.

    That is the context where it is not given, as serving exactly has it. A trainable model keeps what backward needs.
    """
    length = length or model.config.context
    found: list[Tensor] = []
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        batch = torch.tensor([[*text[:length], *[0] * (length - len(text))] for text in some])
        logits = model(batch).detach()
        found += [row[: len(text)].clone() for row, text in zip(logits, some, strict=True)]
    return found


def decoded_logits(model: GPT, texts: Tensor, *, exact: bool = False, padding: Tensor | None = None) -> Tensor:
    """Logits (B, T - 1, V) after each token of texts (B, T) but the last, every one of them decoded from a cache."""
    cache = cache_for(model, texts, exact=exact, padding=padding)
    found = [decode(model, texts[:, at : at + 1], cache) for at in range(texts.shape[1] - 1)]
    return torch.stack(found, dim=1)


def cache_for(model: GPT, texts: Tensor, *, exact: bool, padding: Tensor | None = None) -> KVCache:
    """An empty one that texts (B, T) fit."""
    B, T = texts.shape
    if exact and padding is None:
        padding = torch.zeros(B, dtype=torch.long)
    return room_for(model, batch=B, capacity=T, padding=padding, exact=exact)


def exactly(master: GPT, rows: int) -> GPT:
    """As exact serving holds it; `rows` is what `exact.fewest_rows` gave."""
    model = freeze(master)
    use_exact(model, rows)
    return model


def logprobs_of(logits: Sequence[Tensor], texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> Tensor:
    """Of the tokens that were sampled, by logits (new, V) of each text; (N,), in double precision."""
    found = []
    for each, text, start in zip(logits, texts, prompts, strict=True):
        tokens = torch.tensor(text[start:])[:, None]
        found.append(each.double().log_softmax(-1).gather(-1, tokens).squeeze(1))
    return torch.cat(found)


def distances(served: Tensor, trained: Tensor) -> Iterator[tuple[str, str | None, float]]:
    """Quantity, which statistic of it, and its value, from log-probabilities (N,) of tokens that `served` sampled.

    The importance ratio is the policy's probability over its sampler's. Both estimates of KL(served, trained) are
    Schulman's (2020, "Approximating KL divergence"): k1 has no bias, k3 none either and far less variance.
    """
    apart = (served - trained).abs()
    yield "difference", "largest", float(apart.max())
    yield "difference", "mean", float(apart.mean())
    for name, at in QUANTILES.items():
        yield "difference", name, float(apart.quantile(at))
    yield "equal", None, float((served.float() == trained.float()).double().mean())  # engines tell fp32
    ratio = (trained - served).exp()
    for name, value in ends_of(ratio):
        yield "importance ratio", name, value
    yield "clipped", None, float(((ratio - 1).abs() > CLIP).double().mean())
    yield "divergence", "k1", float((served - trained).mean())
    yield "divergence", "k3", float((torch.expm1(trained - served) - (trained - served)).mean())


def ends_of(ratio: Tensor) -> Iterator[tuple[str, float]]:
    """Of importance ratios (N,)."""
    for name, at in {"smallest": 0.0, "1 %": 0.01, "99 %": 0.99, "largest": 1.0}.items():
        yield name, float(ratio.quantile(at))


def distances_of_logits(served: Tensor, trained: Tensor) -> Iterator[tuple[str, str | None, float]]:
    """The same from logits (N, V): over the whole vocabulary."""
    p, q = served.double().log_softmax(-1), trained.double().log_softmax(-1)
    yield "divergence", "whole vocabulary", float((p.exp() * (p - q)).sum(-1).mean())
    yield "flips", None, 1000 * float((served.argmax(-1) != trained.argmax(-1)).double().mean())


class Likeliest:
    """Training's likeliest token after each of a text's. A text that several ways of serving write is read once."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """(T,) of each."""
        new = [text for text in dict.fromkeys(map(tuple, texts)) if text not in self.known]
        self.known |= {
            text: logits.argmax(-1) for text, logits in zip(new, forward_logits(self.model, new), strict=True)
        }
        return [self.known[tuple(text)] for text in texts]


def agreed(greedy: Served, likeliest: Likeliest) -> int:
    """Tokens of the shortest beginning of a greedy text that training's `likeliest` tokens give too."""
    found = []
    for own, text, start in zip(likeliest(greedy.texts), greedy.texts, greedy.prompts, strict=True):
        same = (own[start - 1 : -1] == torch.tensor(text[start:])).int()
        found.append(int(same.cumprod(0).sum()))
    return min(found)


def rows_of(case: Case, way: Mapping[str, Condition], served: Served, master: GPT, double: GPT | None) -> Iterator[Row]:
    """`way` is what conditions say of it; `double` is the same model in fp64."""
    logits = served.own(forward_logits(master, served.texts))
    trained = logprobs_of(logits, served.texts, served.prompts)
    sampled = torch.tensor([one for each in served.logprobs for one in each], dtype=torch.float64)
    found = list(distances(sampled, trained))
    if served.logits:
        found += distances_of_logits(torch.cat(served.logits), torch.cat(logits))
    way = {**way, "sequences": len(served.texts)}
    for quantity, statistic, value in found:
        yield row(case, quantity, value, way, statistic=statistic)
    if double is not None:
        length = min(max(map(len, served.texts)), case.model.context)  # of any shape: padding would only take time
        referee = logprobs_of(
            served.own(forward_logits(double, served.texts, length=length)), served.texts, served.prompts
        )
        for of, one in (("serving", sampled), ("training", trained)):
            yield row(case, "distance from fp64", float((one - referee).abs().mean()), way, of=of)


def closeness(case: Case, master: GPT, frozen: GPT, text: Sequence[int]) -> list[Row]:
    """The short form, for a training's report: one text served as usual."""
    new_tokens = min(CLOSE_TOKENS, case.model.context // 2)
    served = serve(forward_passes, frozen, [text[:new_tokens]], batch=1, seed=case.seed, new_tokens=new_tokens)
    way: dict[str, Condition] = {"way": "cached decode", "batch": 1, "new_tokens": new_tokens}
    rows = rows_of(case, way, served, master.eval(), None)
    return [each for each in rows if each.conditions.get("statistic") in ("largest", "smallest")]


def row(case: Case, quantity: str, value: float, way: Mapping[str, Condition], **more: Condition) -> Row:
    return case.row(about(case, quantity, way, more), value=value)


def missing_row(case: Case, quantity: str, why: object, way: Mapping[str, Condition], **more: Condition) -> Row:
    return case.row(about(case, quantity, way, more), unavailable(str(why)))


def about(case: Case, quantity: str, way: Mapping[str, Condition], more: Mapping[str, Condition]) -> RowFields:
    conditions = {**case.conditions(), **way, **{key: told for key, told in more.items() if told is not None}}
    return {"life": "inference", "phase": "decode", "quantity": quantity, "per": "token", "conditions": conditions}


def in_double(frozen: GPT) -> GPT:
    """The same weights, every number of the forward in fp64."""
    model = GPT(frozen.config, dtype=torch.float64).double()
    model.load_state_dict(frozen.state_dict())
    return model.eval().requires_grad_(False)
