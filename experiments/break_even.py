"""When does serving a model overtake what training it cost, in FLOPs, device time, energy and money?

Predicted from shapes, the hardware's peaks and the shares of them that are assumed reached: nothing is run. A served
token is one that a request brings or gets. Time is of one device: sharing a model between devices is taken to cost
nothing. A prompt is read alone, bound by its products or by the weights; answers are decoded `decode_batch` at once,
each with its own keys and values and its part of the weights' bytes. The closed form takes every request to be of the
mean lengths; a simulated stream of Poisson arrivals draws them, and says what that is worth.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from isoforward import cost, economics, units
from isoforward.compare import only, select
from isoforward.config import ModelConfig, TrackingConfig, at_least, one_of, within
from isoforward.entry import claim, run
from isoforward.errors import BadInput
from isoforward.hardware import TABLE, Hardware, lookup
from isoforward.results import Results, Row, Verdict, read, write

if TYPE_CHECKING:
    from rich.table import Table

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
MISSING = {"energy at TDP": "the hardware's power is not known", "money": "no price is known: write price_per_hour="}
BREAK_EVEN = ("inference", "run", "break-even", "tokens", "run")
DAYS = ("inference", "run", "days until break-even", "days", "run")
EQUAL_BATCH = ("inference", "decode", "batch as costly as training", "sequences", "step")
SERVED = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the break-even: where a life's cost is told
KINDS, INTERVALS = 1000, 200  # of requests; of time until the break-even that is expected


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hardware: str = "h100"
    precision: str = "bf16"
    tokens: float | None = None  # trained on; None: 20 a parameter
    training_length: int | None = None  # None: the context, at most 8192
    training_mfu: float = 0.4
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
    run_dir: str = ""

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("fp32", "bf16"))
        within("tokens", 1 if self.tokens is None else self.tokens, 1, 1e18)
        within("requests_per_day", self.requests_per_day, 1, 1e15)
        for name in ("training_length", "prompt", "new_tokens", "devices", "decode_batch"):
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model in both lives on one kind of device."""

    asked: BreakEven
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
        forward, backward = (
            count(self.model, batch=1, length=self.length) for count in (cost.forward_flops, cost.backward_flops)
        )
        return (forward + backward).total / self.length

    @property
    def trained_token_s(self) -> float:
        return self.trained_token_flops / (self.peak * self.asked.training_mfu)

    def training(self) -> dict[str, float]:
        """By COSTS, all of it; unknown ones are absent."""
        bare = self.bare_flops(economics.TRAINED, self.tokens)
        return self.costs(bare, self.trained_token_flops * self.tokens, self.trained_token_s * self.tokens, 0)

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
        moved = cost.inference_bytes(self.model, batch=1, length=prompt, dtype=self.asked.precision).total
        prefill_s = self.bound_s(flops, moved)
        if new == 1:
            return prefill_s
        first, last = (self.decoded_token_s(cached, self.asked.decode_batch) for cached in (prompt, prompt + new - 2))
        return prefill_s + (new - 1) * (first + last) / 2  # what is cached grows by one a step

    def decoded_token_s(self, cached: int, batch: int) -> float:
        flops = cost.decode_flops(self.model, batch=1, cached=cached).total
        moved = cost.inference_bytes(self.model, batch=batch, cached=cached, dtype=self.asked.precision).total
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
        whole = cost.inference_bytes(self.model, batch=1, cached=self.midway, dtype=self.asked.precision)
        shared = whole.pop("weights")
        left = self.trained_token_s * self.bytes_per_s - whole.total
        flops = cost.decode_flops(self.model, batch=1, cached=self.midway).total
        if left <= 0 or self.bound_s(flops, 0) > self.trained_token_s:
            return None
        return math.ceil(shared / left)

    def serving_bytes(self, batch: int) -> int:
        """At most: one prompt is read at a time, beside the caches of all."""
        size: dict[str, Any] = {"prompt": self.asked.prompt, "new": self.asked.new_tokens}
        length, dtype = self.asked.prompt + self.asked.new_tokens, self.asked.precision
        others = cost.kv_bytes(self.model, batch=batch - 1, length=length, dtype=dtype)
        reading = cost.inference_peaks(self.model, batch=1, dtype=dtype, **size)["prefill"] + others
        return max(reading, cost.inference_peaks(self.model, batch=batch, dtype=dtype, **size)["decode"])

    def devices_for(self, held: int) -> int:
        return math.ceil(held / self.hardware.memory_bytes)


def plan(asked: BreakEven) -> Plan:
    """Raises BadInput for what cannot be: a longer text than the context, no known rate, too little memory."""
    model = asked.model
    one_of("model.source", model.source, ("fresh", "hf"))
    if model.source == "hf":
        from isoforward.weights import find

        model = find(Path(str(model.path)), verify=False).config
    if asked.hardware == "here":
        raise BadInput(
            "hardware=here has no calibration that this could read: write hardware=FILE after "
            f"python experiments/calibrate.py, or one of {', '.join(TABLE)}"
        )
    hardware = lookup(asked.hardware)
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
        weights = units.size(cost.weight_bytes(model, dtype=asked.precision))
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
    return np.maximum(1, np.rint(mean * np.exp(sigma * quantiles - sigma**2 / 2))).astype(int)


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


# Rows


def told(plan: Plan, about: tuple[str, str, str, str, str], value: float | None, **more: Any) -> Row:
    life, phase, quantity, unit, per = about
    kept = {key: more.pop(key) for key in ("provenance", "reason") if key in more}
    kept.setdefault("provenance", "unavailable" if value is None else "predicted")
    kept["convention"] = "model" if quantity == "flops" else None
    at = {"life": life, "phase": phase, "quantity": quantity, "unit": unit, "per": per}
    return Row(experiment="break_even", **at, value=value, **kept, conditions=assumptions(plan) | more)


def assumptions(plan: Plan) -> dict[str, Any]:
    """What every row rests upon."""
    asked, model, hardware = plan.asked, plan.model, plan.hardware
    shape = {key: getattr(model, key) for key in ("family", "layers", "width", "heads", "vocab")}
    keys = ("requests_per_day", "prompt", "new_tokens", "spread", "devices", "decode_batch", "busy")
    shares = ("training_mfu", "prefill_mfu", "decode_mbu")
    return (
        shape
        | {"parameters": plan.parameters, "dtype": asked.precision, "hardware": hardware.name}
        | {"hardware_source": hardware.source, "peaks": hardware.provenance, "peak_flops_per_s": plan.peak}
        | {"peak_bytes_per_s": hardware.bandwidth_bytes_per_s, "tdp_w": hardware.tdp_w}
        | {"trained_tokens": plan.tokens, "training_length": plan.length}
        | {key: getattr(asked, key) for key in (*shares, *keys)}
        | dict(zip(("training_price_per_hour", "price_per_hour"), plan.prices, strict=True))
    )


def rows(plan: Plan) -> Iterator[Row]:
    yield from lives(plan)
    yield from inversion(plan)
    for life, phase, held in (
        ("inference", "decode", plan.serving_bytes(plan.asked.decode_batch)),
        ("training", "optimizer", cost.training_state(plan.model).total),  # activations come on top
    ):
        yield told(plan, (life, phase, "memory", "byte", "step"), held, devices_needed=plan.devices_for(held))


def lives(plan: Plan) -> Iterator[Row]:
    """Both lives in every cost, and where they meet."""
    asked, training, request = plan.asked, plan.training(), plan.request(plan.asked.prompt, plan.asked.new_tokens)
    per_request = asked.prompt + asked.new_tokens
    draws = np.random.default_rng(asked.seed)
    stream = kinds(plan, draws)
    for name, (quantity, unit, counted) in COSTS.items():
        at = {"cost": name, "counted": counted}
        if name not in training or name not in request:
            yield told(plan, BREAK_EVEN, None, reason=MISSING[name], **at)
            continue
        if quantity == "energy":
            at["provenance"] = "estimated"  # TDP is what a device may draw, not what it did
        bill = training[name]
        tokens = economics.break_even_tokens(bill * per_request, request[name])
        yield told(plan, ("training", "step", quantity, unit, "token"), bill / plan.tokens, **at)
        yield told(plan, ("inference", "token", quantity, unit, "token"), request[name] / per_request, **at)
        for share in SERVED if counted == EXACT else ():
            for life, spent in (("training", bill), ("inference", bill * share)):
                yield told(plan, (life, "run", quantity, unit, "run"), spent, served_tokens=tokens * share, **at)
        yield told(plan, BREAK_EVEN, tokens, **at)
        each = np.array([float(kind[name]) for kind in stream])
        for how, days in (
            ("closed form", tokens / per_request / asked.requests_per_day),
            ("simulated", simulated_days(float(bill), each, asked.requests_per_day, draws)),
        ):
            yield told(plan, DAYS, days, stream=how, **at)


def inversion(plan: Plan) -> Iterator[Row]:
    """A token decoded alone against a trained one: by 6N and 2N FLOPs and every weight moved once, and exactly."""
    trained_s = plan.bare_flops(economics.TRAINED, 1) / (plan.peak * plan.asked.training_mfu)
    weights = cost.weight_bytes(plan.model, dtype=plan.asked.precision)
    decoded_s = plan.bound_s(plan.bare_flops(economics.SERVED, 1), weights)
    flops = cost.decode_flops(plan.model, batch=1, cached=plan.midway).total / plan.trained_token_flops
    for counted, ratios in (
        (BARE, {"time": decoded_s / trained_s, "FLOPs": economics.SERVED / economics.TRAINED}),
        (EXACT, {"time": plan.decoded_token_s(plan.midway, 1) / plan.trained_token_s, "FLOPs": flops}),
    ):
        for compared, value in ratios.items():
            at = {"compared": compared, "counted": counted, "context": plan.midway, "decode_batch": 1}
            yield told(plan, ("inference", "decode", "against a trained token", "x", "token"), value, **at)
    batch = plan.equal_batch()
    if batch is None:
        yield told(plan, EQUAL_BATCH, None, reason="its products, or its own keys and values, alone take longer")
    else:
        needed = plan.devices_for(plan.serving_bytes(batch))
        yield told(plan, EQUAL_BATCH, batch, context=plan.midway, devices_needed=needed)


# What is said


def value_of(results: Results, **wanted: Any) -> float | None:
    row = only(results, **wanted)
    return None if row is None else row.value


def table(results: Results) -> "Table":
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "training", "a million\nserved", "overtakes\nat tokens", "days", "days,\nsimulated", "differ"):
        shown.add_column(name, no_wrap=True, justify="right" if shown.columns else "left")
    for name, (_, unit, _) in COSTS.items():
        met = only(results, quantity="break-even", cost=name)
        if met.value is None:
            continue
        trained, served = (value_of(results, life=life, per="token", cost=name) for life in ("training", "inference"))
        closed, drawn = (value_of(results, cost=name, stream=how) for how in ("closed form", "simulated"))
        shown.add_row(
            *(name, amount(trained * met.conditions["trained_tokens"], unit), amount(served * 1e6, unit)),
            *(units.count(met.value), plain(closed), plain(drawn), f"{drawn / closed - 1:+.1%}"),
        )
    return shown


def amount(value: float, unit: str) -> str:
    if unit == "usd":
        return f"${value:,.2f}" if value < 100 else f"${plain(value)}"
    if unit == "s":
        return units.seconds(value) if value < 7200 else f"{plain(value / 3600)} h"
    return f"{value:.2e} {'J' if unit == 'joule' else 'FLOP'}"


def plain(value: float) -> str:
    return units.digits(value) if 1e-3 < value < 1e7 else f"{value:.2e}"


def assumed(results: Results) -> str:
    at = only(results, quantity="break-even", cost="device time").conditions
    held, state = (only(results, quantity="memory", life=life) for life in ("inference", "training"))
    prices = [at["training_price_per_hour"], at["price_per_hour"]]
    paid = "" if None in prices else f"paid {prices[0]:g} usd an hour in training, {prices[1]:g} in serving\n"
    return (
        f"{at['parameters']:,} parameters, {at['dtype']}; {at['hardware']}, peaks {at['peaks']}\n{paid}"
        f"training {units.count(at['trained_tokens'])} tokens by {at['training_length']}, MFU {at['training_mfu']:g}; "
        f"its state needs {units.size(state.value)}, {state.conditions['devices_needed']} devices\n"
        f"serving {at['requests_per_day']:,.0f} requests a day of {at['prompt']} + {at['new_tokens']} tokens, "
        f"prefill MFU {at['prefill_mfu']:g},\n  decode MBU {at['decode_mbu']:g} in batches of {at['decode_batch']}, "
        f"busy {at['busy']:g}; it needs {units.size(held.value)}, {held.conditions['devices_needed']} devices\n"
    )


def answer(results: Results) -> str:
    met = []
    for name, said in (("FLOPs, 6ND/2N", "FLOPs by 6ND and 2N"), ("device time", "device time"), ("money", "money")):
        row = only(results, quantity="break-even", cost=name)
        if row.value is not None:
            times = units.times(row.value / row.conditions["trained_tokens"])
            met.append(f"{units.count(row.value)} in {said} ({times} those trained)")
    closed, drawn = (value_of(results, cost="device time", stream=how) for how in ("closed form", "simulated"))
    slower, fewer = (
        [units.times(row.value) for row in select(results, quantity="against a trained token", compared=what)]
        for what in ("time", "FLOPs")
    )
    equal = only(results, quantity="batch as costly as training")
    even = f"no batch makes up for that: {equal.reason}"
    if equal.value is not None:
        even = (
            f"from batches of {equal.value:,.0f} on it takes no longer (devices: {equal.conditions['devices_needed']})"
        )
    return (
        f"Serving overtakes training at so many served tokens: {', '.join(met)}. In device time that is "
        f"{plain(closed)} days, {plain(drawn)} in a simulated stream. A token decoded alone takes {slower[0]} a "
        f"trained one in time at {fewer[0]} its FLOPs ({slower[1]} and {fewer[1]} counted exactly); {even}."
    )


def main(config: BreakEven) -> None:
    predicted = list(rows(plan(config)))  # refuses before anything heavy is loaded, or written

    import torch
    from rich.console import Console

    from isoforward.experiment import command_line, publish
    from isoforward.hardware import environment
    from isoforward.tables import trust

    unknown = (row.reason for row in predicted if row.reason is not None)
    reasons = ("nothing was measured: utilisations and prices are as given", *dict.fromkeys(unknown))
    console = Console()
    with claim(config) as run_dir:
        where = environment(command_line(), torch.device("cpu"))
        verdict = Verdict(experiment="break_even", trusted=False, reasons=reasons, environment=where.id)
        placed = [dataclasses.replace(row, environment=where.id) for row in predicted]
        write(run_dir / "results.jsonl", [where, *placed, verdict])
        results = read(run_dir / "results.jsonl")
        console.print(assumed(results), style="dim", markup=False, highlight=False)
        console.print(table(results))
        trust(console, list(reasons))
        console.print(f"\n{answer(results)}\n", markup=False, highlight=False, style="bold")
        publish(config, run_dir, console, results, job_type="experiment")


if __name__ == "__main__":
    sys.exit(run(main, "break_even", BreakEven))
