"""Does it fit, how long does it take, and what is the cheapest way to make it fit: a model, a setup and a device.

Nothing is run and nothing allocated. Every figure has an interval, and says what that rests upon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Protocol

from isoforward.base.datasheets import TABLE, Hardware
from isoforward.base.errors import BadInput
from isoforward.plan import economics, efficiency
from isoforward.plan.subject import STRATEGIES, Amount, Serving, Setup, Subject

MEMORY_ERROR = 0.10  # of a predicted peak, to either side: experiments/fits.py holds it against real limits
FEWER, MORE = 1 / (1 + MEMORY_ERROR), 1 + MEMORY_ERROR
KERNELS_BYTES = 2**25  # that libraries take for themselves, at most: packed operands, results wider than their dtype
MOST_DEVICES = 1024
MOST_REMEDIES = 5


@dataclass(frozen=True, kw_only=True)
class Figure:
    """With the interval that like predictions kept to."""

    value: float
    low: float
    high: float
    doubt: str = ""

    def scaled(self, factor: float) -> Figure:
        return replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)


class Clock(Protocol):
    """What work takes on one kind of device."""

    @property
    def basis(self) -> str: ...
    def step(self, subject: Subject, setup: Setup) -> Figure: ...
    def prefill(self, subject: Subject, serving: Serving, devices: int) -> Figure: ...
    def decode(self, subject: Subject, serving: Serving, devices: int) -> Figure: ...


def peak(size: float) -> Figure:
    return Figure(value=size, low=size * FEWER, high=size * MORE + KERNELS_BYTES)


@dataclass(frozen=True, kw_only=True)
class OnPaper:
    """By the data sheet, at the share of it that others reached."""

    hardware: Hardware

    @property
    def key(self) -> str | None:
        return next((key for key, known in TABLE.items() if known.name == self.hardware.name), None)

    @property
    def basis(self) -> str:
        known = efficiency.share("training", self.key)
        where = "on it" if known.known else "on other devices"
        return f"data sheet, at the share that {known.measurements} published speeds reached, some of them {where}"

    def peak_flops_per_s(self, precision: str) -> float:
        found = self.hardware.peak_flops_per_s.get(precision)
        if found is None:
            known = [dtype for dtype in ("fp32", "bf16") if dtype in self.hardware.peak_flops_per_s]
            way = " or ".join(f"precision={dtype}" for dtype in known) or "another hardware"
            raise BadInput(f"precision={precision}: the rate of {self.hardware.name} is not known; write {way}")
        return found

    def time(self, work: str, amount: Amount, precision: str, devices: int) -> Figure:
        by_products = efficiency.share("training" if work.startswith("decode") else work, self.key)
        by_bytes = efficiency.share(work if work.startswith("decode") else "decode", self.key)
        products_s = amount.flops / (self.peak_flops_per_s(precision) * by_products.value * devices)
        bytes_s = amount.moved_bytes / (self.hardware.bandwidth_bytes_per_s * by_bytes.value * devices)
        value, bound = max((products_s, by_products), (bytes_s, by_bytes), key=lambda each: each[0])
        return Figure(value=value, low=value * bound.low, high=value * bound.high)

    def step(self, subject: Subject, setup: Setup) -> Figure:
        return self.time("training", subject.step(setup), setup.precision, setup.devices)

    def prefill(self, subject: Subject, serving: Serving, devices: int) -> Figure:
        return self.time("prefill", subject.prefill(serving), serving.precision, devices)

    def decode(self, subject: Subject, serving: Serving, devices: int) -> Figure:
        work = "decode" if devices == 1 else "decode on several"
        return self.time(work, subject.decode(serving), serving.precision, devices)


@dataclass(frozen=True, kw_only=True)
class Plan:
    subject: Subject
    hardware: Hardware
    setup: Setup
    serving: Serving
    clock: Clock

    def training_bytes(self, setup: Setup) -> dict[str, float]:
        """Of one device, by phase. What a strategy cuts up is gathered again, block by block, where it is weights."""
        stage, ways = STRATEGIES[setup.strategy], setup.devices
        gathered = 4 * self.subject.largest_unit if stage == 3 and ways > 1 else 0
        whole = self.subject.training(setup, fused_norm=not self.hardware.calibration)
        found = {}
        for phase, held in whole.items():
            state = {part: held[part] for part in ("weights", "gradients", "optimizer")}
            found[phase] = economics.zero_bytes(state, ways=ways, stage=stage) + held["activations"] + gathered
        return found

    def training_peak(self, setup: Setup) -> Figure:
        return peak(max(self.training_bytes(setup).values()))

    def serving_bytes(self) -> dict[str, float]:
        """Of one device: weights and caches are cut into as many equal parts."""
        return {phase: held / self.setup.devices for phase, held in self.subject.serving_bytes(self.serving).items()}

    def serving_peak(self) -> Figure:
        return peak(max(self.serving_bytes().values()))

    def fits(self, held: Figure) -> str:
        """`yes` and `no` hold over the whole interval."""
        if held.high <= self.hardware.memory_bytes:
            return "yes"
        return "no" if held.low > self.hardware.memory_bytes else "uncertain"

    def users_at_most(self) -> int:
        """Whose caches fit beside the weights, at the upper end of the interval."""
        held = [self.subject.serving_bytes(replace(self.serving, users=n))["decode"] for n in (1, 2)]
        room = (self.hardware.memory_bytes - KERNELS_BYTES) * self.setup.devices * FEWER - held[0]
        return max(0, 1 + math.floor(room / max(1, held[1] - held[0]))) if room >= 0 else 0

    def remedies(self) -> list[Remedy]:
        """What makes training fit, the cheapest first: of each set of changed keys the cheapest, none with a change
        more than another that costs no more."""
        now, paper = self.clock.step(self.subject, self.setup), OnPaper(hardware=self.hardware)
        asked_s = paper.step(self.subject, self.setup).value
        best: dict[tuple[str, ...], Remedy] = {}
        for setup, held in self.fitting():
            ratio = paper.step(self.subject, setup).value / asked_s
            changed, cost = changes(self.setup, setup), ratio * setup.devices / self.setup.devices
            found = Remedy(setup=setup, changes=changed, peak=held, time=now.scaled(ratio), cost=cost)
            key = tuple(changed)
            if key not in best or found.order < best[key].order:
                best[key] = found
        ranked = sorted(best.values(), key=lambda remedy: remedy.order)
        return [
            one
            for n, one in enumerate(ranked)
            if not any(set(other.changes) < set(one.changes) for other in ranked[:n])
        ][:MOST_REMEDIES]

    def fitting(self) -> Iterator[tuple[Setup, Figure]]:
        """Setups that fit, and what they hold. Kept as they are: the tokens of a step and their length."""
        asked, choices = self.setup, self.subject.choices
        precisions = [asked.precision, *(["bf16"] if "bf16" in self.hardware.peak_flops_per_s else [])]
        checkpointings = choices["checkpointing"][choices["checkpointing"].index(asked.checkpointing) :]
        lighter = [name for name in ("muon", "momentum") if name in choices["optimizer"]]
        optimizers = [asked.optimizer, *(lighter[:1] if asked.optimizer in ("adam", "adamw") else [])]
        pieces = [n for n in range(1, asked.batch + 1) if asked.batch % n == 0]
        cuts = [(asked.devices, asked.strategy)]
        more = {2**n for n in range(1, MOST_DEVICES.bit_length()) if 2**n >= asked.devices} | {asked.devices}
        cuts += [(n, "fsdp") for n in sorted(more) if n > 1 and asked.batch % n == 0]
        adapters = [asked.adapter]
        if asked.adapter.name == "none" and "lora" in choices["adapter"]:
            adapters.append(replace(asked.adapter, name="lora"))
        for (devices, strategy), optimizer, adapter in product(cuts, optimizers, adapters):
            if strategy == "fsdp" and (optimizer == "muon" or adapter.name != "none"):
                continue  # they need whole matrices
            if adapter != asked.adapter and optimizer != asked.optimizer:
                continue  # of an adapter the state is small already
            for precision, checkpointing in product(dict.fromkeys(precisions), checkpointings):
                smaller = [n for n in pieces if n >= asked.accumulate and asked.batch % (n * devices) == 0]
                for accumulate in smaller:
                    made = replace(
                        asked,
                        devices=devices,
                        strategy=strategy,
                        optimizer=optimizer,
                        precision=precision,
                        checkpointing=checkpointing,
                        accumulate=accumulate,
                        adapter=adapter,
                    )
                    held = self.training_peak(made)
                    if self.fits(held) == "yes":
                        yield made, held
                        break  # smaller micro-batches only take longer


@dataclass(frozen=True, kw_only=True)
class Remedy:
    setup: Setup
    changes: dict[str, object]  # by key
    peak: Figure
    time: Figure  # of a step
    cost: float  # device time over that of the setup asked for, if it fitted

    @property
    def order(self) -> tuple[int, float, int]:
        """What is learnt changes with the optimizer and with an adapter: such changes come last."""
        return len({"optimizer", "adapter"} & self.changes.keys()), round(self.cost, 2), len(self.changes)


def changes(asked: Setup, made: Setup) -> dict[str, object]:
    """As overrides would say them."""
    keys = [each.name for each in fields(Setup)]
    changed = {key: getattr(made, key) for key in keys if getattr(made, key) != getattr(asked, key)}
    return changed | ({"adapter": made.adapter.name} if "adapter" in changed else {})
