"""How far the log-probabilities that serving gives are from those of training's forward, on the tokens it sampled.

An engine samples from its own numbers and training learns from its own; both should be the same policy. Serving is
taken as it is used: it samples, and gives the log-probability of each token. Training's forward then reads the same
texts, padded at the right to the model's context, which causal attention does not see. A forward in fp64 says which of
the two is nearer to the exact numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isoforward.base.results import Row, RowFields
from isoforward.base.vocabulary import Condition
from isoforward.measure.case import Case
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import Pass, Sampling, forward_passes

CLIP = 0.2  # of PPO (Schulman 2017) and GRPO: ratios beyond 1 +- this are cut
QUANTILES = {"median": 0.5, "99 %": 0.99}
CLOSE_TOKENS = 64  # served for a training's report
SEQUENCES = 4  # that training's forward reads at once

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


def trained_logits(model: GPT, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Training's forward, gradients and all: logits after every token of each text, (T, V) each."""
    context = model.config.context
    found: list[Tensor] = []
    for start in range(0, len(texts), SEQUENCES):
        some = texts[start : start + SEQUENCES]
        batch = torch.tensor([[*text[:context], *[0] * (context - len(text))] for text in some])
        logits = model(batch).detach()
        found += [row[: len(text)].clone() for row, text in zip(logits, some, strict=True)]
    return found


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


def agreed(model: GPT, greedy: Served) -> int:
    """Tokens of the shortest beginning of a greedy text that training's likeliest tokens give too."""
    own = greedy.own(trained_logits(model, greedy.texts))
    found = []
    for logits, text, start in zip(own, greedy.texts, greedy.prompts, strict=True):
        same = (logits.argmax(-1) == torch.tensor(text[start:])).int()
        found.append(int(same.cumprod(0).sum()))
    return min(found)


def rows_of(case: Case, way: Mapping[str, Condition], served: Served, master: GPT, exact: GPT | None) -> Iterator[Row]:
    """`way` is what conditions say of it; `exact` is the same model in fp64."""
    logits = served.own(trained_logits(master, served.texts))
    trained = logprobs_of(logits, served.texts, served.prompts)
    sampled = torch.tensor([one for each in served.logprobs for one in each], dtype=torch.float64)
    found = list(distances(sampled, trained))
    if served.logits:
        found += distances_of_logits(torch.cat(served.logits), torch.cat(logits))
    for quantity, statistic, value in found:
        yield row(case, quantity, value, way, statistic=statistic)
    if exact is not None:
        referee = logprobs_of(served.own(trained_logits(exact, served.texts)), served.texts, served.prompts)
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
    about: RowFields = {"life": "inference", "phase": "decode", "quantity": quantity, "per": "token"}
    conditions = {**case.conditions(), **way, **{key: told for key, told in more.items() if told is not None}}
    return case.row(about, value=value, conditions=conditions)


def in_double(frozen: GPT) -> GPT:
    """The same weights, every number of the forward in fp64."""
    model = GPT(frozen.config, dtype=torch.float64).double()
    model.load_state_dict(frozen.state_dict())
    return model.eval().requires_grad_(False)
