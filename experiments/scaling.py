"""How does each phase's cost grow with width, depth, length, batch and context?

    python experiments/calibrate.py && python experiments/scaling.py
    python experiments/scaling.py axes=[width,length] model.width=256

The model given is the smallest of each sweep; the largest has four times its width, depth, length or batch. The
exponent is the slope of log time over log size, with the interval that the noise of the samples leaves. Beside it
stands the slope that the calibration of this machine predicts.

:chapter: Planning
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from isoforward.app.command_line import claim, run
from isoforward.app.question import case_of, command_line, tell
from isoforward.base.config import ExperimentConfig, one_of
from isoforward.base.datasheets import lookup
from isoforward.base.environment import environment
from isoforward.base.results import Results, Row, read, write
from isoforward.measure.case import Case, Laps, apart, record, row, timed
from isoforward.measure.train_and_serve import byte_rows, decoding, flop_rows, peak_rows, prefilling
from isoforward.plan.calibration import phased
from isoforward.plan.forecast import PHASES, forecaster
from isoforward.show.compare import select

AXES = ("width", "depth", "length", "batch", "context")
FACTORS = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling(ExperimentConfig):
    axes: list[str] = dataclasses.field(default_factory=lambda: list(AXES))

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in self.axes:
            one_of("axes", axis, AXES)


def scaled(case: Case, axis: str, factor: int) -> Case:
    """`context`: what decoding looks back at, by a longer prompt."""
    model, measure = case.model, case.measure
    if axis == "width":
        heads = None if model.kv_heads is None else model.kv_heads * factor
        wider = dataclasses.replace(model, width=model.width * factor, heads=model.heads * factor, kv_heads=heads)
        return dataclasses.replace(case, model=wider)
    if axis == "depth":
        return dataclasses.replace(case, model=dataclasses.replace(model, layers=model.layers * factor))
    if axis == "batch":
        return dataclasses.replace(case, batch=case.batch * factor)
    longer = dataclasses.replace(model, context=max(model.context, case.length * factor, measure.prompt * factor * 2))
    if axis == "length":
        return dataclasses.replace(case, model=longer, length=case.length * factor)
    prompt = dataclasses.replace(measure, prompt=measure.prompt * factor)
    return dataclasses.replace(case, model=longer, measure=prompt)


def concerned(axis: str) -> Iterator[tuple[str, str, str]]:
    """Life, phase and execution of what changes with an axis."""
    for life, phases in PHASES.items():
        for phase, per in phases.items():
            if axis in ("width", "depth") or (life == "inference") == (axis == "context"):
                yield life, phase, per


def measure(packed: dict) -> str:
    case, axis, factor = Case.unpack(packed["case"]), packed["axis"], packed["factor"]

    def tell_rows(laps: Laps, cold: Laps) -> Iterator[Row]:
        samples = {name: [lap[name] for lap in rounds] for rounds in laps.values() for name in rounds[0]}
        for life, phase, per in concerned(axis):
            at = {"prefill": prefilling, "decode": decoding}.get(phase, Case.training)(case)
            more = {"axis": axis, "factor": factor}
            if phase == "decode":
                more["executions"] = case.new_tokens - 1
            yield row(case, life=life, phase=phase, per=per, **timed(samples[phase]), conditions={**at, **more})
        if factor == 1:
            at = {"axis": axis, "factor": factor}
            for told in (*flop_rows(case), *byte_rows(case), *peak_rows(case)):
                if told.conditions.get("context") is None and told.convention in (None, "model"):
                    yield dataclasses.replace(told, conditions={**told.conditions, **at})

    return record(packed, phased(case), tell_rows)


def slope(points: list[tuple[int, list[float]]]) -> tuple[float, float, float]:
    """Of log time over log size; its interval holds 95 % of the slopes of as many samples drawn anew."""
    sizes = np.log([size for size, _ in points])
    draw = np.random.default_rng(0)
    fitted = float(np.polyfit(sizes, np.log([median(samples) for _, samples in points]), 1)[0])
    again = [
        np.polyfit(sizes, np.log([np.median(draw.choice(samples, len(samples))) for _, samples in points]), 1)[0]
        for _ in range(400)
    ]
    low, high = np.quantile(again, (0.025, 0.975))
    return fitted, min(float(low), fitted), max(float(high), fitted)


def exponents(case: Case, axis: str, measured: list[Row], by: Any) -> Iterator[Row]:
    told = [by.times(scaled(case, axis, factor)) for factor in FACTORS]
    for life, phase, per in concerned(axis):
        about: dict[str, Any] = {"life": life, "phase": phase, "per": per, "quantity": "exponent", "unit": "power"}
        seen = select(tuple(measured), phase=phase, quantity="time")
        value, low, high = slope([(int(r.conditions["factor"]), list(r.samples)) for r in seen])
        yield row(case, **about, value=value, low=low, high=high, conditions={"axis": axis, "how": "measured"})
        at = {"axis": axis, "calibration": by.conditions["calibration"]}
        times = [(factor, [times[phase]]) for factor, (times, _) in zip(FACTORS, told, strict=True)]
        if all(samples[0] > 0 for _, samples in times):
            warnings = tuple(dict.fromkeys(why for _, warned in told for why in warned.get(phase, ())))
            more = {"provenance": "predicted", "warnings": warnings, "value": slope(times)[0]}
            yield row(case, **about, **more, conditions={**at, "how": "predicted"})


def answer(results: Results) -> str:
    told = []
    for axis in dict.fromkeys(each.conditions["axis"] for each in select(results, quantity="exponent")):
        found = {each.phase: each.value for each in select(results, quantity="exponent", axis=axis, how="measured")}
        guessed = {each.phase: each.value for each in select(results, quantity="exponent", axis=axis, how="predicted")}
        shown = [
            f"{phase} {value:.2f}" + (f" ({guessed[phase]:.2f})" if phase in guessed else "")
            for phase, value in found.items()
            if phase in ("forward", "backward", "optimizer", "prefill", "decode")
        ]
        told.append(f"{axis}: {', '.join(shown)}")
    return f"Time grows with the power of, predicted in brackets: {'; '.join(told)}."


def main(config: Scaling) -> None:
    case, by = case_of(config, "scaling"), forecaster(lookup(config.hardware))
    console = Console()
    with claim(config) as run_dir:
        results = Path(run_dir) / "results.jsonl"
        where = environment(command_line(), torch.device(case.device))
        with console.status("measuring") as status:
            for axis in config.axes:
                for factor in FACTORS:
                    status.update(f"measuring {axis} x {factor}")
                    each = scaled(case, axis, factor)
                    apart(each, "scaling:measure", results, command_line(), axis=axis, factor=factor)
                seen = [r for r in read(results).rows if r.conditions.get("axis") == axis]
                rows = [dataclasses.replace(r, environment=where.id) for r in exponents(case, axis, seen, by)]
                write(results, [where, *rows] if axis == config.axes[0] else rows)
        tell(config, run_dir, console, answer)


if __name__ == "__main__":
    sys.exit(run(main, Scaling))
