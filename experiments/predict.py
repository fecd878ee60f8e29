"""How well are time and memory of every phase predicted, on models that the calibration never saw?

    python experiments/calibrate.py && python experiments/predict.py
    python experiments/predict.py seed=7 layouts=30               others, and more of them
    python experiments/predict.py memory=false                    times alone, in half the time
    python experiments/predict.py check=false model=gpt2 data.length=1024 data.batch=4
    python experiments/predict.py model=llama3_70b data.length=4096 hardware=h100

Models are drawn from the seed. Each is predicted from the machine's calibration and measured in a process of its own.
In every round a small model that never changes runs too, as it did when the machine was calibrated. How much slower it
is now (`pace`) is the one thing that a prediction takes from the time of its measurement. With check=false, or hardware
that is not this machine, the model is predicted alone and never allocated.

:chapter: Planning
:unread: measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from isoforward.app.command_line import run
from isoforward.app.question import Asking, asking, case_of
from isoforward.app.telling import tell_predictions
from isoforward.base import units
from isoforward.base.checks import within
from isoforward.base.config import ExperimentConfig, ModelConfig
from isoforward.base.datasheets import Hardware, calibrated_here, lookup
from isoforward.base.device import device_of
from isoforward.base.results import Results, Row, RowFields, at_most_one, read, select, unavailable
from isoforward.base.subprocesses import Failed
from isoforward.base.vocabulary import Condition
from isoforward.measure.benchmark import Work
from isoforward.measure.case import Case
from isoforward.measure.memory import Account, account
from isoforward.measure.passes import Bench
from isoforward.model import cost
from isoforward.plan.calibration import REFERENCE, REFERRED, SAMPLES, pace, runs_of, sample
from isoforward.plan.forecast import PHASES, predicted

MOST_FLOPS = 4e10  # of a step: some tenths of a second here
LIFE = {"training": "training", "inference": "generation"}  # as memory.py names them
GOALS = ("forward", "backward", "prefill", "decode", "loss", "optimizer")
MEDIAN, WORST = 0.08, 0.25  # at most, of each phase's errors in time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(ExperimentConfig):
    check: bool = True
    memory: bool = True  # measured too, which takes two processes more for each
    layouts: int = 14  # drawn from seed; every third in bf16, where the machine multiplies it

    def __post_init__(self) -> None:
        super().__post_init__()
        within("layouts", self.layouts, 1, 200)


def held_out(config: Predict, hardware: Hardware) -> Iterator[Case]:
    """Drawn anew from each seed, of sizes that lie within what is calibrated; none of them can have been tuned for."""
    draw, threads = random.Random(config.seed), hardware.calibration["identity"]["threads"]
    settings = dataclasses.replace(config.measure, prompt=48, new_tokens=24)
    bf16 = "bf16" in hardware.peak_flops_per_s and device_of("cpu").multiplies_bf16()
    seen = {(family, width, layers) for family, width, _, layers, *_ in SAMPLES}
    drawn = 0
    while drawn < config.layouts:
        head_width = draw.choice((32, 64))
        heads, layers = draw.randint(2, 1024 // head_width), draw.randint(2, 5)
        batch, length = 2 ** draw.randint(0, 5), 32 * draw.randint(2, 32)
        shape: dict[str, Any] = {"family": draw.choice(("gpt2", "llama")), "layers": layers, "heads": heads}
        width = heads * head_width
        model = ModelConfig(**shape, width=width, vocab=1024, context=max(length, 96))
        step = 3 * cost.forward_flops(model, batch=batch, length=length).total
        if step > MOST_FLOPS or width < 96 or batch * length > 4096 or (model.family, width, layers) in seen:
            continue
        size: dict[str, Any] = {"batch": batch, "length": length, "measure": settings}
        size["precision"] = "bf16" if bf16 and drawn % 3 == 2 else "fp32"
        drawn += 1
        yield Case(experiment="predict", model=model, threads=threads, seed=config.seed, optim=config.optim, **size)


def bench(case: Case, layout: str) -> Bench:
    """The model, and right beside each of its samples one of the model that never changes."""
    training, serving, _ = runs_of(case)
    ours = [work.labelled(layout=layout) for work in (training.phased, serving.generation)]
    training, serving, _ = runs_of(sample(REFERENCE))
    beside = [as_reference(work, layout) for work in (training.phased, serving.generation)]
    pairs = [(one.parts[0], other.parts[0]) for one, other in zip(ours, beside, strict=True)]
    return Bench(works=[*ours, *beside], pairs=pairs)


def as_reference(work: Work, layout: str) -> Work:
    parts = (dataclasses.replace(part, conditions={"layout": layout}, quantity="reference") for part in work.parts)
    return Work(parts=tuple(parts), run=work.run)


def at(case: Case, phase: str) -> dict[str, Condition]:
    return {"prefill": case.prefilling, "decode": case.decoding}.get(phase, case.training)()


def memory_rows(case: Case, life: str, found: Account | Failed, layout: str) -> Iterator[Row]:
    for phase, per in PHASES[life].items():
        about: RowFields = {"life": life, "phase": phase, "quantity": "memory"}
        about |= {"per": per if life == "training" else "sequence", "conditions": {**at(case, phase), "layout": layout}}
        if isinstance(found, Failed):
            yield case.row(about, unavailable(found.reason))
        else:
            yield case.row(about, value=float(found.measured[phase]))


def error_rows(case: Case, rows: list[Row], quantity: str) -> Iterator[Row]:
    """Predicted over measured, less one."""
    for said in select(rows, provenance="predicted", quantity=quantity):
        seen = at_most_one(rows, provenance="measured", life=said.life, phase=said.phase, quantity=quantity)
        if seen is not None and seen.value:
            about: RowFields = {"life": said.life, "phase": said.phase, "per": said.per, "warnings": said.warnings}
            value = said.number / seen.number - 1
            conditions = {**said.conditions, "of": said.quantity}
            yield case.row(about, quantity="error", value=value, conditions=conditions)


def check(config: Predict, hardware: Hardware, run: Asking) -> None:
    cases = {named(case): case for case in held_out(config, hardware)}
    with run.console.status("predicting") as status:
        for layout, case in cases.items():
            status.update(f"predicting and timing {layout}")
            run.measure(case, bench, layout)
            seen = select(read(run.results), layout=layout)
            now_s = {row.phase: row.number for row in select(seen, quantity="reference") if row.phase in REFERRED}
            now = pace(now_s, hardware.calibration["references_s"])
            said = run.add(predicted(hardware, case, pace=now, layout=layout))
            run.add(error_rows(case, [*seen, *said], "time"))
        if config.memory:
            status.update("measuring memory, of two models at once: their times do not matter")
            wanted = [(layout, life) for layout in cases for life in LIFE]
            with ThreadPoolExecutor(2) as pool:
                held = pool.map(lambda one: account(cases[one[0]], LIFE[one[1]]), wanted)
                for (layout, life), found in zip(wanted, held, strict=True):
                    run.add(memory_rows(cases[layout], life, found, layout))
            rows = read(run.results).rows
            for layout, case in cases.items():
                run.add(error_rows(case, [row for row in rows if row.conditions.get("layout") == layout], "memory"))


def named(case: Case) -> str:
    model = case.model
    return f"{model.family} {model.width} x {model.layers}, {case.batch} x {case.length}, {case.precision}"


def answer(results: Results) -> str:
    def spread(**wanted: Any) -> str:
        errors = sorted(abs(row.number) for row in select(results, quantity="error", **wanted))
        return f"{median(errors):.0%}, at worst {errors[-1]:.0%}" if errors else "not measured"

    checked = len({row.conditions["layout"] for row in select(results, quantity="error")})
    if not checked:
        told = select(results, provenance="predicted", quantity="time")
        phases = ", ".join(f"{each.phase} {units.seconds(each.number)}" for each in told)
        held = max(row.number for row in select(results, provenance="predicted", quantity="memory", life="training"))
        how = "at least" if told and told[0].conditions["calibration"] is None else "about"
        on = results.rows[0].conditions["hardware"]
        return f"Predicted for {on}, {how}: {phases}; training holds {units.size(held)}."
    errors = "; ".join(f"{phase} {spread(phase=phase, of='time')}" for phase in GOALS)
    missed = [phase for phase in GOALS if not met(results, phase)]
    goal = f"median at most {MEDIAN:.0%}, worst {WORST:.0%}, " + (f"missed by {', '.join(missed)}" if missed else "met")
    peaks = [peak_error(results, life) for life in PHASES]
    return (
        f"Over {checked} models apart from the calibration, median and worst error of the predicted time: {errors} "
        f"(goal: {goal}); of peak memory: training {peaks[0]}, inference {peaks[1]}."
    )


def met(results: Results, phase: str) -> bool:
    errors = [abs(row.number) for row in select(results, quantity="error", phase=phase, of="time")]
    return bool(errors) and median(errors) <= MEDIAN and max(errors) <= WORST


def peak_error(results: Results, life: str) -> str:
    """Of the largest of a life's phases, which is what must fit."""
    errors = []
    for layout in dict.fromkeys(each.conditions["layout"] for each in select(results, quantity="error", of="memory")):
        said, seen = (
            max(each.number for each in select(results, quantity="memory", life=life, layout=layout, provenance=how))
            for how in ("predicted", "measured")
        )
        errors.append(abs(said / seen - 1))
    return f"{median(errors):.1%}, at worst {max(errors):.1%}" if errors else "not measured"


def main(config: Predict) -> None:
    hardware, ours = lookup(config.hardware), calibrated_here()
    if config.check and ours and hardware.calibration.get("identity") == ours.calibration["identity"]:
        with asking(config, answer) as run:
            run.note()
            check(config, hardware, run)
    else:
        rows = list(predicted(hardware, predicted_case(config)))
        reasons = ("nothing was measured", *dict.fromkeys(reason for row in rows for reason in row.warnings))
        tell_predictions(config, rows, reasons, answer)


def predicted_case(config: Predict) -> Case:
    """Nothing is measured here for what may run elsewhere."""
    return case_of(dataclasses.replace(config, precision=precision(config)), "predict", rows=())


def precision(config: Predict) -> str:
    """Of hardware that is not this machine, bf16 wherever it has a rate for it."""
    if config.precision != "auto":
        return config.precision
    peaks = lookup(config.hardware).peak_flops_per_s
    return "bf16" if peaks.get("bf16", 0) > peaks.get("fp32", 0) else "fp32"


if __name__ == "__main__":
    sys.exit(run(main, Predict))
