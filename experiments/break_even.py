"""When does serving a model overtake what training it cost, in FLOPs, device time, energy and money?

    python experiments/break_even.py model=llama3_8b hardware=h100 tokens=15e12 price_per_hour=2.5
    python experiments/break_even.py model=llama2_7b hardware=a100 decode_batch=1 prompt=1 new_tokens=100
    python experiments/break_even.py model=llama3_70b devices=3 requests_per_day=1e7
    python experiments/break_even.py adapter=lora adapter.targets=[q,v] tokens=1e8
    python experiments/break_even.py method=grpo tokens=1e9 decode_batch=256

Nothing is run, downloaded or allocated. tokens=null is 20 a parameter; training_length=null is the context, at most
8192. Training is of all weights, of an adapter (adapter=), or method=grpo: reinforcement learning, whose tokens are
those of prompts and of the answers that the model gives itself, decode_batch at a time. Utilisations are shares of the
hardware's peaks: *_mfu of its FLOP/s, decode_mbu of its bandwidth. busy is the share of its paid time in which a
serving device serves; spread is that of the lengths of requests. The closed form takes every request to be of the mean
lengths. A simulated stream of Poisson arrivals draws the lengths, and shows how far the closed form is off.
isoforward.plan.lifetime has the formulas.

:chapter: Planning
:unread: adapter.alpha model.norm_eps model.rope_scaling model.rope_theta
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from isoforward.app.command_line import run
from isoforward.base import units
from isoforward.base.config import TrackingConfig
from isoforward.base.datasheets import lookup
from isoforward.base.results import Results, Row, RowFields, only, row_of, select
from isoforward.model import cost, footprint
from isoforward.model.adapter_cost import adapted_training_state
from isoforward.plan import economics
from isoforward.plan.lifetime import BARE, COSTS, EXACT, Assumptions, Plan, kinds, plan, simulated_days

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MISSING = {
    "FLOPs, 6ND/2N": "6ND is of all weights, trained on text that is there; what is asked is counted exactly",
    "energy at TDP": "the hardware's power is not known",
    "money": "no price is known: write price_per_hour=",
}
BREAK_EVEN = ("inference", "run", "break-even", "tokens", "run")
DAYS = ("inference", "run", "days until break-even", "days", "run")
EQUAL_BATCH = ("inference", "decode", "batch as costly as training", "sequences", "step")
SERVED = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the break-even: where a life's cost is told


@dataclass(frozen=True, kw_only=True)
class BreakEven(Assumptions):
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hardware: str = "h100"
    run_dir: str = ""


def told(plan: Plan, about: tuple[str, str, str, str, str], value: float | None, **more: Any) -> Row:
    life, phase, quantity, unit, per = about
    at: RowFields = {"life": life, "phase": phase, "quantity": quantity, "unit": unit, "per": per, "value": value}
    how: RowFields = {
        "provenance": more.pop("provenance", "unavailable" if value is None else "predicted"),
        "reason": more.pop("reason", None),
        "convention": "model" if quantity == "flops" else None,
    }
    return row_of("break_even", at, how, conditions=assumptions(plan) | more)


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
        | ({} if asked.adapter.name == "none" else {"adapter": asked.adapter.told})
        | ({} if asked.method == "supervised" else {"method": asked.method, "epochs": asked.epochs})
        | {key: getattr(asked, key) for key in (*shares, *keys)}
        | dict(zip(("training_price_per_hour", "price_per_hour"), plan.prices, strict=True))
    )


def rows(plan: Plan) -> Iterator[Row]:
    yield from lives(plan)
    yield from inversion(plan)
    for life, phase, held in (
        ("inference", "decode", plan.serving_bytes(plan.asked.decode_batch)),
        ("training", "optimizer", adapted_training_state(plan.model, plan.asked.adapter).total),  # activations on top
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
    weights = footprint.weight_bytes(plan.model, dtype=plan.asked.precision)
    decoded_s = plan.bound_s(plan.bare_flops(economics.SERVED, 1), weights)
    flops = cost.decode_flops(plan.model, batch=1, cached=plan.midway).total / plan.trained_token_flops
    exact = {"time": plan.decoded_token_s(plan.midway, 1) / plan.trained_token_s, "FLOPs": flops}
    ways = {EXACT: exact}
    if plan.asked.pretraining:
        ways = {BARE: {"time": decoded_s / trained_s, "FLOPs": economics.SERVED / economics.TRAINED}, EXACT: exact}
    for counted, ratios in ways.items():
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


def value_of(results: Results, **wanted: Any) -> float:
    return only(results, **wanted).number


def table(results: Results) -> "Table":
    from isoforward.show.tables import plain_table

    columns = ("", "training", "a million\nserved", "overtakes\nat tokens", "days", "days,\nsimulated", "differ")
    shown = plain_table(*columns, left=("",))
    for name, (_, unit, _) in COSTS.items():
        met = only(results, quantity="break-even", cost=name)
        if met.value is None:
            continue
        trained, served = (value_of(results, life=life, per="token", cost=name) for life in ("training", "inference"))
        closed, drawn = (value_of(results, cost=name, stream=how) for how in ("closed form", "simulated"))
        shown.add_row(
            *(name, amount(trained * met.setting("trained_tokens"), unit), amount(served * 1e6, unit)),
            *(units.count(met.number), plain(closed), plain(drawn), f"{drawn / closed - 1:+.1%}"),
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
    at: Mapping[str, Any] = only(results, quantity="break-even", cost="device time").conditions
    held, state = (only(results, quantity="memory", life=life) for life in ("inference", "training"))
    what = f"{at['adapter']}, " if "adapter" in at else ""
    by = f"in GRPO steps of {at['decode_batch']}" if "method" in at else f"by {at['training_length']}"
    prices = [at["training_price_per_hour"], at["price_per_hour"]]
    paid = "" if None in prices else f"paid {prices[0]:g} usd an hour in training, {prices[1]:g} in serving\n"
    return (
        f"{at['parameters']:,} parameters, {at['dtype']}; {at['hardware']}, peaks {at['peaks']}\n{paid}"
        f"training {what}{units.count(at['trained_tokens'])} tokens {by}, MFU {at['training_mfu']:g}; "
        f"its state needs {units.size(state.number)}, {state.conditions['devices_needed']} devices\n"
        f"serving {at['requests_per_day']:,.0f} requests a day of {at['prompt']} + {at['new_tokens']} tokens, "
        f"prefill MFU {at['prefill_mfu']:g},\n  decode MBU {at['decode_mbu']:g} in batches of {at['decode_batch']}, "
        f"busy {at['busy']:g}; it needs {units.size(held.number)}, {held.conditions['devices_needed']} devices\n"
    )


def answer(results: Results) -> str:
    met = []
    for name, said in (("FLOPs, 6ND/2N", "FLOPs by 6ND and 2N"), ("device time", "device time"), ("money", "money")):
        row = only(results, quantity="break-even", cost=name)
        if row.value is not None:
            times = units.times(row.number / row.setting("trained_tokens"))
            met.append(f"{units.count(row.value)} in {said} ({times} those trained)")
    closed, drawn = (value_of(results, cost="device time", stream=how) for how in ("closed form", "simulated"))
    slower, fewer = (
        [units.times(row.number) for row in select(results, quantity="against a trained token", compared=what)]
        for what in ("time", "FLOPs")
    )
    exactly = f" ({slower[1]} and {fewer[1]} counted exactly)" if len(slower) > 1 else ""
    equal = only(results, quantity="batch as costly as training")
    even = f"no batch makes up for that: {equal.reason}"
    if equal.value is not None:
        even = (
            f"from batches of {equal.value:,.0f} on it takes no longer (devices: {equal.conditions['devices_needed']})"
        )
    return (
        f"Serving overtakes training at so many served tokens: {', '.join(met)}. In device time that is "
        f"{plain(closed)} days, {plain(drawn)} in a simulated stream. A token decoded alone takes {slower[0]} a "
        f"trained one in time at {fewer[0]} its FLOPs{exactly}; {even}."
    )


def shown(console: "Console", results: Results) -> None:
    from isoforward.show.tables import verdicts

    console.print(assumed(results), style="dim", markup=False, highlight=False)
    console.print(table(results))
    verdicts(console, results)


def main(config: BreakEven) -> None:
    predicted = list(rows(plan(config, lookup(config.hardware))))  # refuses before anything heavy is loaded, or written

    from isoforward.app.telling import tell_predictions

    unknown = (row.reason for row in predicted if row.reason is not None)
    reasons = ("nothing was measured: utilisations and prices are as given", *dict.fromkeys(unknown))
    tell_predictions(config, predicted, reasons, answer, shown)


if __name__ == "__main__":
    sys.exit(run(main, BreakEven))
