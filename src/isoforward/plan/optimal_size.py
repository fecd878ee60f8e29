"""Which size of model is the cheapest over its whole life, of all that reach one loss: Sardana 2024 (arXiv 2401.00448).

A smaller model reaches the loss with more training tokens and is cheaper to serve. How many tokens is Hoffmann 2022's
law, L = E + A / N^alpha + B / D^beta. It was fitted up to about a hundred tokens a parameter: far beyond, Sardana's
section 4 finds that it promises too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import Hardware
from isoforward.base.errors import BadInput
from isoforward.model import cost
from isoforward.plan.economics import SERVED, TRAINED
from isoforward.plan.lifetime import Assumptions, Plan

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.336, 0.283  # Hoffmann 2022, approach 3, as Sardana 2024 takes them
FITTED = 200.0  # tokens a parameter: beyond, a size is said to lie outside what the law was fitted on
STEPS = 400  # of the search over sizes


def loss(parameters: float, tokens: float) -> float:
    """Nats a token."""
    return E + A / math.pow(parameters, ALPHA) + B / math.pow(tokens, BETA)


def chinchilla_tokens(parameters: float) -> float:
    """That make `parameters` the size of least training FLOPs for the loss reached."""
    return math.pow(BETA * B / (ALPHA * A) * math.pow(parameters, ALPHA), 1 / BETA)


def tokens_for(wanted: float, parameters: float) -> float:
    """Infinite where a model of that size never reaches the loss."""
    left = wanted - E - A / parameters**ALPHA
    return math.pow(B / left, 1 / BETA) if left > 0 else math.inf


def lifetime_flops(wanted: float, parameters: float, served: float) -> float:
    """6ND to train and 2N for each served token, read or written."""
    return parameters * (TRAINED * tokens_for(wanted, parameters) + SERVED * served)


def cheapest(sizes: Iterable[float], of: Callable[[float], float]) -> tuple[float, float]:
    """The size of least cost, and the cost; BadInput where no size reaches the loss."""
    size, price = min(((size, of(size)) for size in sizes), key=lambda each: each[1])
    if math.isinf(price):
        raise BadInput("no size reaches this loss: write a larger like=")
    return size, price


def sizes_below(largest: float) -> list[float]:
    """Down to a hundredth of it, evenly on a logarithmic axis."""
    return [largest * 100 ** (-n / STEPS) for n in range(STEPS + 1)]


# In device time


def shape(layers: int) -> ModelConfig:
    """Of Llama's kind, 128 wide for each layer: 32 layers are its 7B, 40 its 13B."""
    heads = layers  # of 128
    kv_heads = next(n for n in (8, 4, 2, 1) if heads % n == 0)
    return ModelConfig(
        family="llama",
        layers=layers,
        width=128 * layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab=32000,
        context=8192,
        tied=False,
    )


@dataclass(frozen=True, kw_only=True)
class Life:
    """Of one shape that reaches the loss: its training, and what one served token costs, as `lifetime` counts both."""

    parameters: int
    tokens: float  # trained on
    trained: dict[str, float]  # by lifetime.COSTS
    served_token: dict[str, float]

    def cost(self, name: str, served: float) -> float:
        return self.trained[name] + served * self.served_token[name]


def lives(wanted: float, asked: Assumptions, hardware: Hardware, *, largest: float) -> list[Life]:
    """Of all shapes that reach the loss, up to `largest` parameters."""
    found = []
    for layers in range(4, 200):
        model = shape(layers)
        count = cost.parameters(model).total
        if count > largest:
            break
        tokens = tokens_for(wanted, count)
        if math.isinf(tokens) or tokens > 1e18:
            continue
        made = Plan(
            asked=replace(asked, model=model, tokens=tokens),
            model=model,
            hardware=hardware,
            peak=hardware.peak_flops_per_s[asked.precision],
        )
        request = made.request(asked.prompt, asked.new_tokens)
        each = {name: value / (asked.prompt + asked.new_tokens) for name, value in request.items()}
        found.append(Life(parameters=count, tokens=tokens, trained=made.training(), served_token=each))
    if not found:
        raise BadInput("no size reaches this loss: write a larger like=")
    return found
