"""How long each phase will take, and what it will hold, said without running it.

On a calibrated machine a phase takes what its operators take, each read between those that were measured, and what
goes with running them one after another. Of other hardware the peaks alone are known: they bound a time from below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from isoforward.base import units
from isoforward.base.datasheets import Hardware, calibrated_here
from isoforward.base.errors import Integrity
from isoforward.base.results import Row, RowFields, unavailable
from isoforward.base.vocabulary import Condition
from isoforward.measure.case import Case
from isoforward.measure.operators import Operator, Work, deepened, record_serving, record_training
from isoforward.model import cost, footprint
from isoforward.plan import economics
from isoforward.serve.inference import DTYPES

PHASES = {  # by life: each with what one execution of it is
    "training": {"forward": "step", "loss": "step", "backward": "step", "optimizer": "step"},
    "inference": {"prefill": "sequence", "decode": "token"},
}
HELD_OUT = {  # smallest and largest error of predicted times, of models that no calibration saw: docs/recorded/predict
    "forward": (-0.23, 0.18),
    "loss": (-0.52, 0.18),
    "backward": (-0.10, 0.34),
    "optimizer": (-0.39, 0.33),
    "prefill": (-0.30, 0.31),
    "decode": (-0.31, 0.44),
}
UNKNOWN = 0.05  # of a phase's time: more, and it is said
REACH = 1.0  # in doublings: how far a measured operator's word carries


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one kind of operator takes for a unit of work, in logarithms to base 2, over its sizes."""

    sizes: npt.NDArray[np.generic]  # (points, dimensions)
    costs: npt.NDArray[np.generic]  # (points,): seconds a unit of work

    def at(self, size: tuple[int, ...]) -> tuple[float, bool]:
        """Seconds a unit of work, and whether `size` lies within what was measured; at the border where it does not.

        A straight line through the points near by, each weighted by how near it is.
        """
        low, high = self.sizes.min(axis=0), self.sizes.max(axis=0)
        asked = np.log2(size)
        inside = bool(np.all((asked >= low - 0.5) & (asked <= high + 0.5)))
        away = self.sizes - np.clip(asked, low, high)
        distance = (away**2).sum(axis=1)
        reach = max(REACH, float(np.sort(distance)[min(len(distance), 2 * len(size) + 1) - 1]) ** 0.5 / 2)
        weight = np.exp(-distance / reach**2 / 2) + 1e-12
        plane = np.hstack([np.ones((len(away), 1)), away])
        damped = plane.T @ (weight[:, None] * plane) + np.diag([0.0] + [0.02] * away.shape[1]) * weight.sum()
        return float(2 ** np.linalg.solve(damped, plane.T @ (weight * self.costs))[0]), inside


@dataclass(frozen=True, kw_only=True)
class Beyond:
    """What a phase takes beside its operators: each takes `scale` of what it took alone, and `dispatch_s` more.

    `timing_s` is what an operator took more for being timed in its place.
    """

    scale: float
    dispatch_s: float
    timing_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """`times` are seconds by phase, with why not to trust them too far."""

    operators: Mapping[str, list[list[float]]]  # by kind: sizes, and seconds a unit of work
    reading: list[list[float]]  # bytes that lie together, and bytes a second
    beyond: Mapping[str, Beyond]  # by phase
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    buffers_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by dtype and life

    @cached_property
    def curves(self) -> dict[str, Curve]:
        tables = {kind: np.log2(np.array(points)) for kind, points in self.operators.items()}
        return {kind: Curve(sizes=table[:, :-1], costs=table[:, -1]) for kind, table in tables.items()}

    def bytes_per_s(self, resident: float) -> float:
        sizes, rates = np.log2(np.array(self.reading)).T
        return float(2 ** np.interp(np.log2(resident), sizes, rates))

    def operator_s(self, operator: Operator, resident: float) -> tuple[float, bool]:
        """Seconds, and whether its like was measured. `resident`: bytes of weights that take turns in the caches."""
        curve = self.curves.get(operator.kind)
        if curve is None:
            return operator.work / self.bytes_per_s(operator.work), False
        unit_s, known = curve.at(operator.size)
        took_s = operator.work * unit_s
        if operator.kind.startswith(("product nt", "product nn")):  # by a weight
            _, inputs, outputs = operator.size
            moved = inputs * outputs * (2 if operator.kind.endswith("bfloat16") else 4)
            took_s = max(took_s, moved / self.bytes_per_s(resident))
        return took_s, known

    def operators_s(self, work: Work, resident: float) -> tuple[float, float]:
        """Seconds of all, and of those whose like was not measured."""
        told = [(count, *self.operator_s(operator, resident)) for operator, count in work.counts.items()]
        return sum(n * took_s for n, took_s, _ in told), sum(n * took_s for n, took_s, known in told if not known)

    def times(self, case: Case, *, sequences: int = 1) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
        times: dict[str, float] = {}
        warnings: dict[str, tuple[str, ...]] = {}
        for phase, work in works_of(case, sequences=sequences).items():
            alone_s, unknown_s = self.operators_s(work, resident(case, phase))
            more = self.beyond[phase]
            times[phase] = more.scale * alone_s + more.dispatch_s * work.dispatched - more.timing_s * work.operators
            if unknown_s > UNKNOWN * alone_s:
                share = f"{unknown_s / alone_s:.0%} of its time is of operators larger or smaller than any measured"
                warnings[phase] = (f"outside the calibrated range: {share}",)
        return times, warnings


@dataclass(frozen=True, kw_only=True)
class Bound:
    """By peaks alone."""

    hardware: Hardware
    buffers_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by dtype and life

    @property
    def conditions(self) -> dict[str, Condition]:
        return {"hardware": self.hardware.name, "hardware_source": self.hardware.source, "calibration": None}

    def times(self, case: Case) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
        flops, moved = work_of(case)
        peaks: dict[str, float | None] = {
            "flops_per_s": self.hardware.peak_flops_per_s.get(case.precision),
            "bytes_per_s": self.hardware.bandwidth_bytes_per_s,
        }
        bounds = {phase: economics.roofline_time_s(flops[phase], moved[phase], **peaks) for phase in moved}
        times = {phase: bound for phase, bound in bounds.items() if bound is not None}
        said = ("not calibrated: a bound from below by the data sheet's peaks, which no real run reaches",)
        return times, dict.fromkeys(times, said)


def forecaster(hardware: Hardware) -> Calibrated | Bound:
    """Raises Integrity where a file's calibration is not one of ours."""
    made = hardware.calibration
    if not made:
        return Bound(hardware=hardware)
    try:
        return Calibrated(
            operators=made["operators"],
            reading=made["reading"],
            beyond={phase: Beyond(**fit) for phase, fit in made["beyond"].items()},
            conditions={"hardware": hardware.name, "calibration": made["id"]},
            buffers_bytes=dict(made["kernel_buffers_bytes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"the calibration of {hardware.name} is not one of ours ({error}): write it anew"
        raise Integrity(f"{said} with python experiments/calibrate.py") from error


def works_of(case: Case, *, sequences: int = 1) -> dict[str, Work]:
    """By phase, `sequences` being served at once; layers beyond two are not recorded but reckoned."""
    dtype, cached = DTYPES[case.precision], case.prompt + case.new_tokens // 2
    size = cost.Lengths(batch=case.batch, length=case.length)
    training, serving = [], []
    for layers in (1, 2):
        model = replace(case.model, layers=layers)
        taught = record_training(model, **size, optim=case.optim, checkpointing=case.checkpointing, dtype=dtype)
        training.append(taught.works())
        serving.append(record_serving(model, batch=sequences, length=case.prompt, cached=cached, dtype=dtype).works())
    layers = case.model.layers
    return deepened(training[0], training[1], layers) | deepened(serving[0], serving[1], layers)


def resident(case: Case, phase: str) -> float:
    dtype = case.precision if phase in PHASES["inference"] else "fp32"
    return footprint.weight_bytes(case.model, dtype=dtype)


def work_of(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs, where there are any, and bytes by phase."""
    model, cached = case.model, case.prompt + case.new_tokens // 2
    size = cost.Lengths(batch=case.batch, length=case.length)
    flops = {
        "forward": cost.forward_flops(model, **size).total,
        "loss": 0,
        "backward": cost.backward_flops(model, **size).total,
        "optimizer": cost.optimizer_flops(model, optimizer=case.rule).total,
        "prefill": cost.forward_flops(model, batch=1, length=case.prompt, logits="last").total,
        "decode": cost.decode_flops(model, batch=1, cached=cached).total,
    }
    moved = footprint.training_bytes(model, **size, dtype=case.precision, optimizer=case.rule)
    return flops, {
        **moved,
        "prefill": footprint.inference_bytes(model, batch=1, length=case.prompt, dtype=case.precision).total,
        "decode": footprint.inference_bytes(model, batch=1, cached=cached, dtype=case.precision).total,
    }


def peaks_of(case: Case) -> dict[str, int]:
    """Bytes of tensors that each phase holds at most."""
    training = footprint.training_peaks(
        case.model,
        batch=case.micro_batch,
        length=case.length,
        dtype=case.precision,
        optimizer=case.rule,
        accumulate=case.accumulate,
        checkpointing=case.checkpointing,
    )
    serving = footprint.inference_peaks(
        case.model, batch=1, prompt=case.prompt, new=case.new_tokens - 1, dtype=case.precision
    )
    return {**training, **serving}


def predicted(hardware: Hardware, case: Case, *, pace: float = 1.0, **more: Condition) -> Iterator[Row]:
    """Rows of time and memory for every phase. `pace`: how much longer the machine takes now than when calibrated."""
    by = forecaster(hardware)
    times, warnings = by.times(case)
    held = peaks_of(case)
    at = {"forward": case.training(), "prefill": case.prefilling(), "decode": case.decoding()}
    for life, phases in PHASES.items():
        for phase, per in phases.items():
            conditions = {**at.get(phase, case.training()), **by.conditions, "pace": pace, **more}
            about: RowFields = {"life": life, "phase": phase, "conditions": conditions}
            time: RowFields = {"quantity": "time", "per": per}
            if phase in times:
                yield case.row(
                    about,
                    time,
                    value=times[phase] * pace,
                    provenance="predicted",
                    warnings=warnings.get(phase, ()),
                )
            else:
                reason = f"the rate of {hardware.name} in {case.precision} is not known"
                yield case.row(about, time, unavailable(reason))
            need = held[phase] + by.buffers_bytes.get(case.precision, {}).get(life, 0)
            large = (
                (f"{units.size(need)} do not fit the {units.size(hardware.memory_bytes)} of {hardware.name}",)
                if need > hardware.memory_bytes
                else ()
            )
            yield case.row(
                about,
                quantity="memory",
                per=per if life == "training" else "sequence",
                value=float(need),
                provenance="predicted",
                warnings=large,
            )


def averaging_s(calibration: Mapping[str, Any], size: int, *, ways: int) -> float | None:
    """Of gradients of `size` bytes: laid together, summed over a ring, divided, and put back; None if not measured.

    Each of the three passes through memory reads and writes all of them.
    """
    reduced = calibration.get("all_reduce")
    if reduced is None:
        return None
    summing_s = (
        reduced["latency_s"] + economics.collective_bytes("all_reduce", size, ways=ways) / reduced["bytes_per_s"]
    )
    return float(summing_s + 3 * 2 * size / calibration["copying_bytes_per_s"])


def averaging_rows(case: Case, size: int, *, ways: int) -> Iterator[Row]:
    """What it takes here, where this machine's calibration tells."""
    here = calibrated_here()
    time_s = None if here is None else averaging_s(here.calibration, size, ways=ways)
    if here is not None and time_s is not None:
        conditions = case.training(processes=ways, hardware=here.name, calibration=here.calibration["id"])
        about: RowFields = {"life": "training", "phase": "communication", "per": "step", "provenance": "predicted"}
        yield case.row(about, quantity="time", value=time_s, conditions=conditions)
