"""Both lives of a model on one kind of device, from training to the token that makes serving the dearer of them.

Predicted from shapes, the hardware's peaks and the shares of them that are assumed reached: nothing is run. A served
token is one that a request brings or gets. Time is of one device: sharing a model between devices is taken to cost
nothing. A prompt is read alone, bound by its products or by the weights; answers are decoded `decode_batch` at once,
each with its own keys and values and its part of the weights' bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import TypedDict

import numpy as np

from isoforward.base import units
from isoforward.base.checks import at_least, one_of, within
from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.datasheets import Hardware
from isoforward.base.errors import BadInput
from isoforward.model import cost, footprint
from isoforward.model.adapter_cost import adapted_backward_flops, adapted_forward_flops, trained_parameters
from isoforward.model.grpo_cost import PASSES, grpo_bytes, grpo_flops
from isoforward.plan import economics

CHINCHILLA = 20  # tokens a parameter (Hoffmann 2022, table 3)
LONG = 8192  # what Llama 3 trains on before its context is stretched (Llama Team 2024, section 3.4)
BARE, EXACT = "6ND and 2N", "exact"
COSTS = {  # by name, as tables have it: quantity, unit, how FLOPs are counted
    "FLOPs, 6ND/2N": ("flops", "flop", BARE),
    "FLOPs, exact": ("flops", "flop", EXACT),
    "device time": ("time", "s", EXACT),
    "energy at TDP": ("energy", "joule", EXACT),
    "money": ("money", "usd", EXACT),
}
KINDS, INTERVALS = 1000, 200  # of requests; of time until the break-even that is expected


class Answers(TypedDict):
    """Of a GRPO step."""

    batch: int
    prompt: int
    new: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Of both lives of one model; utilisations are shares of the hardware's peaks."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: str = "bf16"
    tokens: float | None = None  # trained on; None: 20 a parameter
    training_length: int | None = None  # None: the context, at most 8192
    training_mfu: float = 0.4
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # what is trained
    method: str = "supervised"  # or grpo: tokens are of prompts and of answers that the model gives itself
    epochs: int = 1  # method=grpo: updates on the same answers
    requests_per_day: float = 1e6
    prompt: int = 1000  # mean tokens of a request
    new_tokens: int = 250  # mean tokens of its answer
    spread: float = 1.0  # standard deviation of both lengths, over their mean, in the simulated stream
    devices: int = 1  # that share one copy of the served model
    prefill_mfu: float = 0.4
    decode_mbu: float = 0.75
    decode_batch: int = 32
    busy: float = 1.0  # share of the paid time in which a serving device serves
    price_per_hour: float | None = None  # of one serving device; None: as its hardware file says
    training_price_per_hour: float | None = None  # None: as serving's
    seed: int = 1234

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("fp32", "bf16"))
        one_of("method", self.method, ("supervised", "grpo"))
        if self.method == "grpo" and self.adapter.name != "none":
            raise BadInput("method=grpo updates all weights; leave out adapter=")
        if self.tokens is None and not self.pretraining:
            raise BadInput("tokens= is not set, and 20 a parameter is a rule for pretraining alone; write tokens=N")
        within("tokens", 1 if self.tokens is None else self.tokens, 1, 1e18)
        within("requests_per_day", self.requests_per_day, 1, 1e15)
        for name in ("training_length", "prompt", "new_tokens", "devices", "decode_batch", "epochs"):
            at_least(name, getattr(self, name), 1)
        for name in ("training_mfu", "prefill_mfu", "decode_mbu", "busy"):
            if not 0 < getattr(self, name) <= 1:
                raise BadInput(f"{name}={getattr(self, name)} must be a share: above 0, at most 1")
        for name in ("price_per_hour", "training_price_per_hour"):
            price = getattr(self, name)
            if price is not None and not 0 < price < 1e9:
                raise BadInput(f"{name}={price} must be positive: what one device costs an hour, or null if unknown")
        within("spread", self.spread, 0, 3)
        within("seed", self.seed, 0, 2**63 - 1)

    @property
    def pretraining(self) -> bool:
        """All weights are trained, on text that is there."""
        return self.method == "supervised" and self.adapter.name == "none"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model in both lives on one kind of device."""

    asked: Assumptions
    model: ModelConfig
    hardware: Hardware
    peak: float  # FLOP/s of one device

    @cached_property
    def tokens(self) -> int:
        return round(self.asked.tokens or CHINCHILLA * self.parameters)

    @cached_property
    def parameters(self) -> int:
        return cost.parameters(self.model).total

    @property
    def length(self) -> int:
        return self.asked.training_length or min(self.model.context, LONG)

    @property
    def prices(self) -> tuple[float | None, float | None]:
        """Of an hour of a training and of a serving device."""
        serving = self.asked.price_per_hour or self.hardware.price_per_hour_usd
        return self.asked.training_price_per_hour or serving, serving

    @cached_property
    def trained_token_flops(self) -> float:
        asked = self.asked
        if asked.method == "grpo":
            return sum(grpo_flops(self.model, **self.answers).values()) / self.answered_tokens
        forward, backward = (
            count(self.model, asked.adapter, batch=1, length=self.length)
            for count in (adapted_forward_flops, adapted_backward_flops)
        )
        return (forward + backward).total / self.length

    @property
    def trained_token_s(self) -> float:
        if self.asked.method == "grpo":
            return sum(self.grpo_step_s(**self.answers).values()) / self.answered_tokens
        return self.trained_token_flops / (self.peak * self.asked.training_mfu)

    @property
    def answers(self) -> Answers:
        """Of a GRPO step: as many as are decoded at once."""
        asked = self.asked
        return {"batch": asked.decode_batch, "prompt": asked.prompt, "new": asked.new_tokens, "epochs": asked.epochs}

    @property
    def answered_tokens(self) -> int:
        return self.asked.decode_batch * (self.asked.prompt + self.asked.new_tokens)

    def grpo_step_s(self, *, batch: int, prompt: int, new: int, epochs: int = 1) -> dict[str, float]:
        """Seconds by phase of a step on `batch` answers, all decoded at once, on the devices as if they were one.

        Prompts, the two passes and the update are bound by their products; decode by the weights and each answer's own
        keys and values; hand-over and optimizer by what they move.
        """
        length = prompt + new - 1
        shape: Answers = {"batch": batch, "prompt": prompt, "new": new, "epochs": epochs}
        flops, dtype = grpo_flops(self.model, **shape), self.asked.precision
        moved = grpo_bytes(
            self.model, batch=batch, prompt=prompt, new=1, epochs=epochs, dtype=dtype
        )  # the decode of all, step by step, is long
        ends = [self.decoded_token_s(cached, batch) for cached in (prompt, max(prompt, length - 1))]
        training, serving = self.peak * self.asked.training_mfu, self.peak * self.asked.prefill_mfu
        return {
            "hand-over": moved["hand-over"] / self.bytes_per_s,
            "prefill": self.bound_s(flops["prefill"], moved["prefill"]),
            "decode": batch * (new - 1) * sum(ends) / 2,  # what is cached grows by one a step
            **{phase: flops[phase] / serving for phase in PASSES},
            **{phase: flops[phase] / training for phase in ("forward", "backward")},
            "optimizer": moved["optimizer"] / self.bytes_per_s,
        }

    def training(self) -> dict[str, float]:
        """By COSTS, all of it; unknown ones are absent."""
        bare = self.bare_flops(economics.TRAINED, self.tokens)
        costs = self.costs(bare, self.trained_token_flops * self.tokens, self.trained_token_s * self.tokens, 0)
        return costs if self.asked.pretraining else {name: costs[name] for name in costs if COSTS[name][-1] != BARE}

    def request(self, prompt: int, new: int) -> dict[str, float]:
        """By COSTS, as paid: idle time is shared out."""
        bare = self.bare_flops(economics.SERVED, prompt + new)
        exact = cost.generation_flops(self.model, batch=1, prompt=prompt, new=new).total
        return self.costs(bare, exact, self.request_s(prompt, new) / self.asked.busy, 1)

    def bare_flops(self, per_parameter_token: int, tokens: int) -> float:
        return economics.lifetime_flops(
            per_parameter_token=per_parameter_token, parameter_count=self.parameters, tokens=tokens
        )

    def costs(self, bare: float, exact: float, time_s: float, side: int) -> dict[str, float]:
        price, watts = self.prices[side], self.hardware.tdp_w
        known = dict(zip(COSTS, (bare, exact, time_s), strict=False))
        if watts is not None:
            known["energy at TDP"] = time_s * watts
        if price is not None:
            known["money"] = economics.money(time_s, price_per_hour=price)
        return known

    def request_s(self, prompt: int, new: int) -> float:
        flops = cost.forward_flops(self.model, batch=1, length=prompt, logits="last").total
        moved = footprint.inference_bytes(self.model, batch=1, length=prompt, dtype=self.asked.precision).total
        prefill_s = self.bound_s(flops, moved)
        if new == 1:
            return prefill_s
        first, last = (self.decoded_token_s(cached, self.asked.decode_batch) for cached in (prompt, prompt + new - 2))
        return prefill_s + (new - 1) * (first + last) / 2  # what is cached grows by one a step

    def decoded_token_s(self, cached: int, batch: int) -> float:
        flops = cost.decode_flops(self.model, batch=1, cached=cached).total
        moved = footprint.inference_bytes(self.model, batch=batch, cached=cached, dtype=self.asked.precision).total
        return self.bound_s(flops, moved / batch)

    def bound_s(self, flops: float, moved_bytes: float) -> float:
        bounds = {"flops_per_s": self.peak * self.asked.prefill_mfu, "bytes_per_s": self.bytes_per_s}
        time_s = economics.roofline_time_s(flops, moved_bytes, **bounds)
        assert time_s is not None
        return time_s

    @property
    def bytes_per_s(self) -> float:
        return self.hardware.bandwidth_bytes_per_s * self.asked.decode_mbu

    @property
    def midway(self) -> int:
        return self.asked.prompt + self.asked.new_tokens // 2

    def equal_batch(self) -> int | None:
        """Sequences decoded at once, midway in an answer, from which on a token costs no more time than a trained one;
        None where its products, or its own keys and values, alone take longer."""
        whole = footprint.inference_bytes(self.model, batch=1, cached=self.midway, dtype=self.asked.precision)
        shared = whole.pop("weights")
        left = self.trained_token_s * self.bytes_per_s - whole.total
        flops = cost.decode_flops(self.model, batch=1, cached=self.midway).total
        if left <= 0 or self.bound_s(flops, 0) > self.trained_token_s:
            return None
        return math.ceil(shared / left)

    def serving_bytes(self, batch: int) -> int:
        """At most: one prompt is read at a time, beside the caches of all."""
        prompt, new, dtype = self.asked.prompt, self.asked.new_tokens, self.asked.precision
        length = prompt + new
        others = footprint.kv_bytes(self.model, batch=batch - 1, length=length, dtype=dtype)
        reading = (
            footprint.inference_peaks(self.model, batch=1, prompt=prompt, new=new, dtype=dtype)["prefill"] + others
        )
        return max(
            reading, footprint.inference_peaks(self.model, batch=batch, prompt=prompt, new=new, dtype=dtype)["decode"]
        )

    def devices_for(self, held: int) -> int:
        return math.ceil(held / self.hardware.memory_bytes)


def plan(asked: Assumptions, hardware: Hardware) -> Plan:
    """Raises BadInput for what cannot be: a longer text than the context, no known rate, too little memory."""
    model = asked.model
    one_of("model.source", model.source, ("fresh", "hf"))
    if model.source == "hf":
        from isoforward.formats.loading import find

        model = find(Path(str(model.path)), verify=False).config
    if asked.adapter.name != "none":
        trained_parameters(model, asked.adapter)  # refuses targets that are not there
    peak = hardware.peak_flops_per_s.get(asked.precision)
    if peak is None:
        known = [dtype for dtype in ("fp32", "bf16") if dtype in hardware.peak_flops_per_s]
        way = " or ".join(f"precision={dtype}" for dtype in known) or "another hardware"
        raise BadInput(f"precision={asked.precision}: the rate of {hardware.name} is not known; write {way}")
    made = Plan(asked=asked, model=model, hardware=hardware, peak=peak)
    for key, length in (("prompt + new_tokens", asked.prompt + asked.new_tokens), ("training_length", made.length)):
        if length > model.context:
            raise BadInput(f"{key}={length} is longer than the model's context of {model.context}; write less")
    held = made.serving_bytes(asked.decode_batch)
    needed = made.devices_for(held)
    if needed > asked.devices:
        weights = units.size(footprint.weight_bytes(model, dtype=asked.precision))
        raise BadInput(
            f"devices={asked.devices}: serving needs {units.size(held)}, {weights} of it weights, most of the rest the "
            f"KV cache of decode_batch={asked.decode_batch}; a {hardware.name} holds "
            f"{units.size(hardware.memory_bytes)}; write devices={needed}, or a smaller decode_batch"
        )
    return made


# The stream


def lengths(mean: int, spread: float, order: np.ndarray) -> np.ndarray:
    """Log-normal, one from the middle of each of as many equally likely parts, in this order."""
    sigma = math.sqrt(math.log1p(spread**2))
    quantiles = np.array([NormalDist().inv_cdf((n + 0.5) / len(order)) for n in order])
    drawn: np.ndarray = np.maximum(1, np.rint(mean * np.exp(sigma * quantiles - sigma**2 / 2))).astype(int)
    return drawn


def kinds(plan: Plan, draws: np.random.Generator) -> list[dict[str, float]]:
    """What requests of KINDS equally likely pairs of lengths cost; the context cuts off what is longer."""
    asked, context = plan.asked, plan.model.context
    new = lengths(asked.new_tokens, asked.spread, draws.permutation(KINDS)).clip(max=context - 1)
    prompts = np.minimum(lengths(asked.prompt, asked.spread, draws.permutation(KINDS)), context - new)
    return [plan.request(int(p), int(n)) for p, n in zip(prompts, new, strict=True)]


def simulated_days(bill: float, each: np.ndarray, requests_per_day: float, draws: np.random.Generator) -> float:
    """Until requests that cost `each`, all alike likely, have cost the bill.

    Arrivals of every kind are a Poisson process of their own, so that only their number in an interval is drawn: a
    stream of 10^12 takes no longer than one of 1000. Within the interval of the crossing they are taken to be even.
    """
    interval = bill / (each.mean() * requests_per_day) / INTERVALS
    spent, elapsed = 0.0, 0
    while True:
        counts = draws.poisson(requests_per_day * interval / len(each), size=(INTERVALS, len(each)))
        steps = np.concatenate([[spent], spent + (counts @ each).cumsum()])
        if steps[-1] >= bill:
            crossing = int(np.searchsorted(steps, float(bill)))
            part = (bill - steps[crossing - 1]) / (steps[crossing] - steps[crossing - 1])
            return float((elapsed + crossing - 1 + part) * interval)
        spent, elapsed = steps[-1], elapsed + INTERVALS
