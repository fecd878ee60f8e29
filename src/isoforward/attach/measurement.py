"""One training that is watched, from its first step to the rows about it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from isoforward.attach.account import COUNTED, IN_STEP, OCCASIONS, RESIDUAL, TIMED, WHOLE, Account, Sampling, Step
from isoforward.attach.frozen import Call, time_frozen, unlike_in_training
from isoforward.attach.hooks import Hooks, trained_by
from isoforward.attach.step_flops import StepFlops
from isoforward.base import units
from isoforward.base.device import device_of
from isoforward.base.disturbance import between, look
from isoforward.base.environment import environment
from isoforward.base.results import Environment, Results, Row, RowFields, Verdict, at_most_one, row_of
from isoforward.base.statistics import FEWEST, ratio_unpaired, summarise
from isoforward.base.stopwatch import Clock
from isoforward.base.vocabulary import Condition
from isoforward.measure.benchmark import Part
from isoforward.measure.passes import comparison_of, fields
from isoforward.serve.inference import DTYPES
from isoforward.show.phases import Phases

NAME = "attach"
MARGIN = 0.03
CLOSED = 0.05  # a timed step may differ by so much from one that is not, before it is said


class Measurement:
    """`start`, then the training, then `stop`; `phases` makes rows of what was seen."""

    def __init__(self, sampling: Sampling, *, clock: Clock | None = None, validation_by_mode: bool = False) -> None:
        self.sampling, self.clock = sampling, clock
        self.validation_by_mode = validation_by_mode
        self.calls: list[Call] = []  # of the other life
        self.flops: StepFlops | None = None
        self.counting = False

    def start(self, roots: Iterable[nn.Module] = (), lead: Optimizer | None = None) -> Hooks:
        """Without `roots` they are found once the first step is done: by the weights that its optimizers updated."""
        self.before = look()
        roots = list(roots)
        sampling = self.sampling if roots else replace(self.sampling, warmup=max(1, self.sampling.warmup))
        self.account = Account(self.clock or device_of("cpu"), sampling)
        self.hooks = Hooks(self.account, lead=lead, validation_by_mode=self.validation_by_mode)
        self.account.between_steps = self._between_steps
        self.hooks.watch_torch()
        try:
            self._watch(roots)
        except BaseException:
            self.hooks.undo()
            raise
        self._between_steps(self.account.kind)
        return self.hooks

    def stop(self) -> None:
        self.hooks.undo()
        self._count(False)
        self.account.close()
        if self.account.stepped:
            self.hooks.next_step()
        self.after = look()

    def finish(self, path: Path, *, frozen: bool) -> Phases:
        """Stops, appends the rows to `path`, and says on standard error what was found."""
        self.stop()
        phases = self.phases(frozen=frozen)
        phases.write(path)
        print(f"{phases}\n{sentence(phases, self.calls)}\n{path}", file=sys.stderr)
        return phases

    def recent(self) -> dict[str, float]:
        """Seconds of each phase in the timed step that is known last, and of all of it."""
        step = next((step for step in reversed(self.account.steps) if step.kind == TIMED), None)
        return {} if step is None else {**step.phases, "step": step.seconds}

    def phases(self, *, frozen: bool = True, command: str = "") -> Phases:
        """`frozen` also times the other life: the forwards of the last timed step, as inference runs them."""
        where = environment(command or NAME, self.device)
        steps = alike(self.account.steps)
        timed = [step for step in steps if step.kind == TIMED]
        whole = [step for step in steps if step.kind == WHOLE] or timed
        conditions = self._conditions(steps)

        def part(life: str, phase: str) -> Part:
            return Part(life=life, phase=phase, per="step", conditions=conditions)

        def row(part: Part, samples: list[float]) -> Row:
            return row_of(NAME, part.about, told(samples), quantity="time", environment=where.id)

        rows = []
        for phase in IN_STEP:
            samples = [step.phases.get(phase, 0.0) for step in timed]
            if phase != RESIDUAL and any(samples):
                rows.append(row(part("training", phase), samples))
        compared = []
        if timed:
            whole_s = [step.seconds for step in whole]
            rows.append(row(part("training", "step"), whole_s))
            rows.append(row(part("training", RESIDUAL), [step.phases.get(RESIDUAL, 0.0) for step in timed]))
            self.calls = self.hooks.captured.get(timed[0].backwards, [])
            if frozen and self.calls:
                frozen_s = time_frozen(self.calls, self.account.clock)
                rows.append(row(part("inference", "forward"), frozen_s))
                if len(whole_s) >= FEWEST and min(*whole_s, *frozen_s) > 0:
                    pair = part("training", "step"), part("inference", "forward")
                    ratio = ratio_unpaired(whole_s, frozen_s)
                    compared.append(comparison_of(NAME, pair, ratio, MARGIN, 0.0, 0, environment=where.id))
        for occasion in OCCASIONS:
            if seconds := self.account.occasions_s[occasion]:
                about: RowFields = {"life": "training", "phase": occasion, "per": "run", "conditions": conditions}
                rows.append(row_of(NAME, about, quantity="time", value=seconds, environment=where.id))
        rows += self._flops(conditions, where)
        return Phases(
            results=Results(
                rows=tuple(rows),
                environments={where.id: where},
                verdicts=(self._verdict(where, timed, whole),),
                comparisons=tuple(compared),
            )
        )

    @property
    def device(self) -> torch.device:
        weights = (weight for root in self.hooks.roots for weight in root.parameters())
        first = next(weights, None)
        return torch.device("cpu") if first is None else first.device

    def _watch(self, roots: Iterable[nn.Module]) -> None:
        for root in roots:
            self.hooks.watch_module(root)
        if self.clock is None:
            self.account.clock = device_of(self.device)

    def _between_steps(self, kind: str) -> None:
        if self.account.count == 1 and not self.hooks.roots:
            self.account.resolve()  # by the clock that its marks are of
            self._watch(trained_by(self.hooks.optimizers))
        self.hooks.next_step()
        self._count(kind == COUNTED and not compiled(self.hooks.roots))

    def _count(self, wanted: bool) -> None:
        if wanted == self.counting:
            return
        self.counting = wanted
        if wanted:
            self.flops = StepFlops(lambda: self.account.phase)
            self.flops.__enter__()  # type: ignore[no-untyped-call]
        elif self.flops is not None:
            self.flops.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _conditions(self, steps: list[Step]) -> dict[str, Condition]:
        roots, optimizers = self.hooks.roots, self.hooks.optimizers
        weights = {id(weight): weight.numel() for root in roots for weight in root.parameters()}
        conditions: dict[str, Condition] = {
            "model": " and ".join(type(root).__name__ for root in roots) or "not found",
            "parameters": sum(weights.values()),
            "optimizer": " and ".join(dict.fromkeys(type(one).__name__ for one in optimizers)) or "none",
        }
        if steps and steps[0].backwards > 1:
            conditions["micro_batches"] = steps[0].backwards
        return conditions

    def _flops(self, conditions: dict[str, Condition], where: Environment) -> list[Row]:
        about: dict[str, Any] = {"experiment": NAME, "life": "training", "quantity": "flops", "per": "step"}
        about |= {"conditions": conditions, "convention": "hardware", "environment": where.id}
        if compiled(self.hooks.roots):
            reason = "a compiled module dispatches no operators that could be counted"
            return [Row(**about, phase="step", value=None, provenance="unavailable", reason=reason)]
        if self.flops is None or not self.flops.flops:
            return []
        counts = {phase: float(n) for phase, n in self.flops.flops.items() if phase in IN_STEP}
        counts["step"] = float(sum(counts.values()))
        return [Row(**about, phase=phase, value=n, provenance="counted") for phase, n in counts.items()]

    def _verdict(self, where: Environment, timed: list[Step], whole: list[Step]) -> Verdict:
        over, seen = between(self.before, self.after), self.account.count + self.account.stepped
        figures: dict[str, Condition] = {"elapsed_s": over.elapsed_s, "lost_share": over.lost_share}
        figures |= {"steps": seen, "timed": len(timed)}
        reasons = []
        if len(timed) < FEWEST:
            reasons.append(f"{len(timed)} of {seen} steps were timed, too few for an interval: train longer or every=1")
        if over.disturbed:
            waited = f"threads of this training waited {over.lost_share:.0%} of the time for a processor"
            reasons.append(f"{waited}: run again with fewer threads, or with less beside it")
        if timed and whole is not timed:
            watched = median(step.seconds for step in timed) / (median(step.seconds for step in whole) or 1.0)
            figures["timed_over_whole"] = watched
            if len(whole) >= FEWEST <= len(timed) and abs(watched - 1) > CLOSED:
                reasons.append(f"steps that were timed by phase took {watched:.2f}x the time of those that were not")
        return Verdict(
            experiment=NAME, trusted=not reasons, reasons=tuple(reasons), figures=figures, environment=where.id
        )


def alike(steps: list[Step]) -> list[Step]:
    """Those of the most frequent number of micro-batches: the last of an epoch may have fewer."""
    backwards = Counter(step.backwards for step in steps if step.kind in (TIMED, WHOLE))
    most = max(backwards, key=lambda n: (backwards[n], n), default=0)
    return [step for step in steps if step.backwards == most]


def told(samples: list[float]) -> RowFields:
    """Fields of a row: with fewer samples than an interval needs, the median alone."""
    if len(samples) >= FEWEST:
        return fields(summarise(samples))
    return {"value": median(samples), "samples": tuple(samples)}


def compiled(roots: Iterable[nn.Module]) -> bool:
    every = (module for root in roots for module in root.modules())
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in every)


def sentence(phases: Phases, calls: Sequence[Call]) -> str:
    """What was found, for someone who reads one line."""
    found = phases.results
    step = at_most_one(found, life="training", phase="step", quantity="time")
    if step is None or step.value is None:
        return "No optimizer step was timed: the training ended before one was whole."
    text = f"A training step takes {units.seconds(step.value)}"
    forward = at_most_one(found, life="inference", phase="forward", quantity="time")
    if forward is not None and forward.value:
        ratio = f"{units.times(step.value / forward.value)}"
        if found.comparisons:
            one = found.comparisons[0]
            ratio += f" ({units.times(one.low)} to {units.times(one.high)})"
        text += f", {ratio} its forward in inference ({units.seconds(forward.value)})"
    parts = [row for row in found.rows if row.quantity == "time" and row.phase in IN_STEP and row.life == "training"]
    together = sum(row.value or 0.0 for row in parts)
    if together:
        largest = max(parts, key=lambda row: row.value or 0.0)
        text += f"; {(largest.value or 0.0) / together:.0%} of it is {largest.phase}"
    flops = at_most_one(found, life="training", phase="step", quantity="flops")
    if flops is not None and flops.value and step.value:
        text += f"; it runs at {units.count(flops.value / step.value, 'FLOP/s')}"
        if calls and (peak := peak_flops_per_s(calls[0])):
            text += f", {flops.value / step.value / peak:.1%} of the device's peak"
    unlike = unlike_in_training([call.module for call in calls])
    if forward is not None and unlike:
        text += f". Layers that act differently in inference: {', '.join(unlike)}"
    return f"{text}."


def peak_flops_per_s(call: Call) -> float | None:
    """Of the dtype that its products are in; None where the device's is not known."""
    weight = next(call.module.parameters())
    known = device_of(weight.device).peaks()
    names = {dtype: name for name, dtype in DTYPES.items()}
    return None if known is None else known.peak_flops_per_s.get(names.get(call.autocast or weight.dtype, ""))
