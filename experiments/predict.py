"""How well are time and memory of every phase predicted, on models that the calibration never saw?

Each of them is predicted from the machine's calibration, then measured in processes of its own; reference
kernels run in every round, and say how much slower than when it was calibrated the machine is (`pace`).
With `check=false`, or hardware that is not this machine, `model` is predicted alone: nothing of it is allocated.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from isoforward import units
from isoforward.compare import only, select
from isoforward.config import ExperimentConfig, ModelConfig
from isoforward.entry import claim, run
from isoforward.experiment import case_of, command_line, tell
from isoforward.hardware import environment
from isoforward.measuring.account import account
from isoforward.measuring.both_lives import decoding, generation_of, prefilling, step_of
from isoforward.measuring.case import Case, Laps, apart, record, row, timed
from isoforward.measuring.isolate import Failed
from isoforward.planning.calibration import pace, phased, references
from isoforward.planning.devices import Hardware, calibrated_here, lookup
from isoforward.planning.forecast import PHASES, predicted
from isoforward.results import Results, Row, Verdict, read, write

HELD_OUT = (  # family, width, heads, layers, batch, length, dtype
    ("gpt2", 128, 4, 4, 32, 64, "fp32"),
    ("gpt2", 128, 4, 4, 8, 256, "fp32"),
    ("gpt2", 192, 6, 3, 1, 1024, "fp32"),
    ("llama", 192, 6, 4, 16, 128, "fp32"),
    ("gpt2", 384, 6, 4, 4, 256, "fp32"),
    ("llama", 384, 12, 3, 2, 384, "fp32"),
    ("llama", 512, 8, 3, 4, 128, "fp32"),
    ("gpt2", 768, 12, 2, 8, 64, "fp32"),
    ("llama", 1024, 16, 2, 2, 64, "fp32"),
    ("gpt2", 128, 4, 4, 8, 128, "bf16"),
    ("llama", 192, 6, 3, 4, 192, "bf16"),
    ("gpt2", 512, 8, 2, 1, 256, "bf16"),
    ("llama", 768, 12, 2, 1, 64, "bf16"),
)
GOALS = ("forward", "backward", "prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(ExperimentConfig):
    check: bool = True
    memory: bool = True  # measured too, which takes two processes more for each


def held_out(config: Predict, hardware: Hardware) -> Iterator[Case]:
    settings = dataclasses.replace(config.measure, prompt=48, new_tokens=24)
    for family, width, heads, layers, batch, length, dtype in HELD_OUT:
        shape: dict[str, Any] = {"family": family, "width": width, "heads": heads, "layers": layers}
        model = ModelConfig(**shape, vocab=1024, context=max(length, 96))
        size: dict[str, Any] = {"batch": batch, "length": length, "precision": dtype, "measure": settings}
        threads = hardware.calibration["identity"]["threads"]
        yield Case(experiment="predict", model=model, threads=threads, seed=config.seed, optim=config.optim, **size)


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    runs = references()
    candidates = {**phased(case), "references": lambda: {name: run() for name, run in runs.items()}}

    def tell_rows(laps: Laps, cold: Laps) -> Iterator[Row]:
        samples = {name: [lap[name] for lap in rounds] for rounds in laps.values() for name in rounds[0]}
        for life, phases in PHASES.items():
            for phase, per in phases.items():
                at = {"prefill": prefilling, "decode": decoding}.get(phase, Case.training)(case)
                more = {"executions": case.new_tokens - 1} if phase == "decode" else {}
                conditions = {**at, **more, "layout": packed["layout"]}
                yield row(case, life=life, phase=phase, per=per, **timed(samples[phase]), conditions=conditions)
        about = {"life": "training", "phase": "run", "per": "run"}
        for name in runs:
            conditions = {"layout": packed["layout"], "reference": name}
            yield row(case, **about, **{**timed(samples[name]), "quantity": "reference"}, conditions=conditions)

    return record(packed, candidates, tell_rows)


def memory_rows(case: Case, layout: str) -> Iterator[Row]:
    for life, what in (("training", step_of(case)), ("inference", generation_of(case))):
        found = account(what, threads=case.threads)
        for phase, per in PHASES[life].items():
            at = {"prefill": prefilling, "decode": decoding}.get(phase, Case.training)(case)
            about: dict[str, Any] = {"life": life, "phase": phase, "quantity": "memory", "unit": "byte"}
            about |= {"per": per if life == "training" else "sequence", "conditions": {**at, "layout": layout}}
            if isinstance(found, Failed):
                yield row(case, **about, value=None, provenance="unavailable", reason=found.reason)
            else:
                yield row(case, **about, value=float(found.measured[phase]))


def error_rows(case: Case, rows: list[Row], layout: str) -> Iterator[Row]:
    """Predicted over measured, less one."""
    for said in select(tuple(rows), provenance="predicted", layout=layout):
        at = {"life": said.life, "phase": said.phase, "quantity": said.quantity, "layout": layout}
        seen = only(tuple(rows), provenance="measured", **at)
        if seen is not None and seen.value:
            about = {"life": said.life, "phase": said.phase, "per": said.per, "warnings": said.warnings}
            value = said.value / seen.value - 1
            conditions = {**said.conditions, "of": said.quantity}
            yield row(case, **about, quantity="error", unit="of measured", value=value, conditions=conditions)


def check(config: Predict, hardware: Hardware, results: Path, status: Any) -> None:
    """Each prediction is written before what it is about has been measured, but for the pace of the machine."""
    where = environment(command_line(), torch.device("cpu"))
    write(results, [where])
    for case in held_out(config, hardware):
        model = case.model
        layout = f"{model.family} {model.width} x {model.layers}, {case.batch} x {case.length}, {case.precision}"
        status.update(f"predicting and measuring {layout}")
        apart(case, "predict:measure", results, command_line(), layout=layout)
        seen = [row for row in read(results).rows if row.conditions.get("layout") == layout]
        now_s = {str(r.conditions["reference"]): r.value for r in select(tuple(seen), quantity="reference")}
        now = pace(now_s, hardware.calibration["references_s"])
        said = list(predicted(hardware, case, pace=now, layout=layout))
        more = list(memory_rows(case, layout)) if config.memory else []
        errors = error_rows(case, [*seen, *said, *more], layout)
        write(results, [dataclasses.replace(row, environment=where.id) for row in (*said, *more, *errors)])


def answer(results: Results) -> str:
    def spread(**wanted: Any) -> str:
        errors = sorted(abs(row.value) for row in select(results, quantity="error", **wanted))
        return f"{median(errors):.0%}, at worst {errors[-1]:.0%}" if errors else "not measured"

    checked = len({row.conditions["layout"] for row in select(results, quantity="error")})
    if not checked:
        told = select(results, provenance="predicted", quantity="time")
        phases = ", ".join(f"{each.phase} {units.seconds(each.value)}" for each in told)
        held = max(row.value for row in select(results, provenance="predicted", quantity="memory", life="training"))
        how = "at least" if told and told[0].conditions["calibration"] is None else "about"
        on = results.rows[0].conditions["hardware"]
        return f"Predicted for {on}, {how}: {phases}; training holds {units.size(held)}."
    told = "; ".join(f"{phase} {spread(phase=phase, of='time')}" for phase in GOALS)
    peaks = [peak_error(results, life) for life in PHASES]
    return (
        f"Over {checked} models apart from the calibration, median and worst error of the predicted time: {told}; "
        f"of peak memory: training {peaks[0]}, inference {peaks[1]}."
    )


def peak_error(results: Results, life: str) -> str:
    """Of the largest of a life's phases, which is what must fit."""
    errors = []
    for layout in dict.fromkeys(each.conditions["layout"] for each in select(results, quantity="error", of="memory")):
        said, seen = (
            max(each.value for each in select(results, quantity="memory", life=life, layout=layout, provenance=how))
            for how in ("predicted", "measured")
        )
        errors.append(abs(said / seen - 1))
    return f"{median(errors):.1%}, at worst {max(errors):.1%}" if errors else "not measured"


def main(config: Predict) -> None:
    hardware = lookup(config.hardware)
    console = Console()
    ours = calibrated_here()
    checking = (
        config.check and ours is not None and hardware.calibration.get("identity") == ours.calibration["identity"]
    )
    case = None if checking else dataclasses.replace(case_of(config, "predict"), precision=precision(config))
    with claim(config) as run_dir:
        results = Path(run_dir) / "results.jsonl"
        if case is None:
            with console.status("predicting") as status:
                check(config, hardware, results, status)
        else:
            where = environment(command_line(), torch.device("cpu"))
            rows = [dataclasses.replace(row, environment=where.id) for row in predicted(hardware, case)]
            reasons = ("nothing was measured", *dict.fromkeys(reason for row in rows for reason in row.warnings))
            verdict = Verdict(experiment="predict", trusted=False, reasons=reasons, environment=where.id)
            write(results, [where, *rows, verdict])
        tell(config, run_dir, console, answer)


def precision(config: Predict) -> str:
    """Of hardware that is not this machine, bf16 wherever it has a rate for it."""
    if config.precision != "auto":
        return config.precision
    peaks = lookup(config.hardware).peak_flops_per_s
    return "bf16" if peaks.get("bf16", 0) > peaks.get("fp32", 0) else "fp32"


if __name__ == "__main__":
    sys.exit(run(main, "predict", Predict))
