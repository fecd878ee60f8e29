"""Where does the memory of a training step go, and what is left of it in inference?

    python experiments/memory.py
    python experiments/memory.py model=gpt2 data.batch=2

Varies batch, length, checkpointing, precision and optimizer. Each case has a process of its own. A case that fails is a
row with its reason, and the others go on.

:chapter: Training against inference
:unread: measure.budget measure.context measure.energy measure.margin measure.precision measure.processes
measure.repeats measure.warmup optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys
from collections.abc import Iterator

from isoforward.app.command_line import run
from isoforward.app.question import asking, case_of
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, OptimConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, only, select, unavailable
from isoforward.base.subprocesses import Failed
from isoforward.measure.case import Case
from isoforward.measure.memory import account, held_in, memory_rows


def sweep(case: Case) -> Iterator[tuple[str, Case]]:
    """The case itself, then each setting changed alone."""
    yield "as it is", case
    if case.batch > 1:
        yield "half the batch", dataclasses.replace(case, batch=case.batch // 2)
    if case.length > 1:
        yield "half the length", dataclasses.replace(case, length=case.length // 2)
    yield "selective", dataclasses.replace(case, checkpointing="selective")
    yield "full", dataclasses.replace(case, checkpointing="full")
    yield "bf16", dataclasses.replace(case, precision="bf16")
    for name in ("sgd", "muon"):
        yield name, dataclasses.replace(case, optim=OptimConfig(name=name))


def measured(case: Case, change: str) -> Iterator[Row]:
    also = ("generation",) if change in ("as it is", "bf16") else ()  # else the same weights, served the same way
    for life in ("training", *also):
        found = account(case, life)
        if isinstance(found, Failed):
            about = held_in(case, life, change=change)
            yield case.row(about, unavailable(found.reason), phase="run", per="run")
        else:
            yield from memory_rows(case, life, found, change=change)


def answer(results: Results) -> str:
    def held(life: str, category: str) -> float:
        return only(results, life=life, change="as it is", category=category).number

    peaks = {r.conditions["change"]: r.number for r in select(results, life="training", category="measured peak")}
    whole = peaks.pop("as it is")
    told = ", ".join(f"{change} {units.times(peak / whole)}" for change, peak in peaks.items())
    activations = sum(
        r.number
        for r in select(results, life="training", change="as it is")
        if "activ" in str(r.conditions.get("category"))
    )
    return (
        f"A training step holds {units.size(whole)}, {activations / whole:.0%} of it activations kept for backward; "
        f"serving the same weights holds {units.size(held('inference', 'measured peak'))}. Its peak changes to: {told}."
    )


def main(config: ExperimentConfig) -> None:
    case = case_of(config, "memory")
    failed = []
    with asking(config, answer) as run:
        run.note(case.device)
        with run.console.status("measuring memory") as status:
            for change, each in sweep(case):
                status.update(f"measuring memory: {change}")
                failed += [change for record in run.add(measured(each, change)) if record.value is None]
    if failed:
        raise BadInput(f"not measured: {', '.join(failed)}; the reasons are in {run.results}")


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
