"""How does each phase's cost grow with width, depth, length, batch and context?

    python experiments/calibrate.py && python experiments/scaling.py
    python experiments/scaling.py axes=[width,length] model.width=256

The model given is the smallest of each sweep; the largest has four times its width, depth, length or batch. The
exponent is the slope of log time over log size, with the interval that the noise of the samples leaves. Beside it
stands the slope that the calibration of this machine predicts.

:chapter: Planning
:unread: measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from isoforward.app.command_line import run
from isoforward.app.question import asking, at_most, case_of
from isoforward.base.checks import one_of
from isoforward.base.config import ExperimentConfig
from isoforward.base.datasheets import lookup
from isoforward.base.results import Results, Row, RowFields, read, select
from isoforward.base.vocabulary import Condition
from isoforward.measure.benchmark import Measured, Part
from isoforward.measure.case import Case
from isoforward.measure.passes import Bench, derived
from isoforward.measure.train_and_serve import byte_rows, flop_rows
from isoforward.plan.calibration import runs_of
from isoforward.plan.forecast import PHASES, forecaster

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


def bench(case: Case, axis: str, factor: int) -> Bench:
    training, serving, _ = runs_of(case)
    at: dict[str, Condition] = {"axis": axis, "factor": factor}
    wanted = {(life, phase) for life, phase, _ in concerned(axis)}
    works = [
        work.labelled(**at)
        for work in (training.phased, serving.generation)
        if any((part.life, part.phase) in wanted for part in work.parts)
    ]

    def rows(measured: Measured) -> Iterator[Row]:
        for told in (*flop_rows(case), *byte_rows(case)) if factor == 1 else ():
            if told.conditions.get("context") is None and told.convention in (None, "model"):
                yield dataclasses.replace(told, conditions={**told.conditions, **at})

    return Bench(works=works, rows=rows)


def slopes(points: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """Of log time over log size, by least squares, one for each sample of the size that has fewest.

    Samples of different sizes are from different processes: which of them meet in a slope does not matter.
    """
    sizes = np.log([size for size, _ in points])
    drawn = zip(*(samples for _, samples in points), strict=False)
    return [float(np.polyfit(sizes, np.log(each), 1)[0]) for each in drawn]


def exponents(case: Case, axis: str, measured: list[Row], by: Any) -> Iterator[Row]:
    told = [by.times(scaled(case, axis, factor)) for factor in FACTORS]
    for life, phase, per in concerned(axis):
        about: RowFields = {"life": life, "phase": phase, "per": per}
        seen = select(measured, life=life, phase=phase, quantity="time")
        part = Part(life=life, phase=phase, per=per, conditions={"axis": axis, "how": "measured"})
        yield derived(case, part, slopes([(int(r.setting("factor")), r.samples) for r in seen]), quantity="exponent")
        at = {"axis": axis, "calibration": by.conditions["calibration"]}
        times = [(factor, [times[phase]]) for factor, (times, _) in zip(FACTORS, told, strict=True)]
        if all(samples[0] > 0 for _, samples in times):
            warnings = tuple(dict.fromkeys(why for _, warned in told for why in warned.get(phase, ())))
            more: RowFields = {"provenance": "predicted", "warnings": warnings, "value": slopes(times)[0]}
            yield case.row(about, more, quantity="exponent", conditions={**at, "how": "predicted"})


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
    with asking(config, answer) as run:
        run.note(case.device)
        for axis in config.axes:
            for factor in FACTORS:
                run.say(f"measuring {axis} x {factor}{at_most(config.measure)}")
                run.measure(scaled(case, axis, factor), bench, axis, factor)
            run.add(exponents(case, axis, select(read(run.results), axis=axis), by))


if __name__ == "__main__":
    sys.exit(run(main, Scaling))
