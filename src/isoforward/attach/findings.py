"""What a watched training comes to, as rows: its phases, its other life, its processes, and whether to trust them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.optim import Optimizer

from isoforward.attach.account import IN_STEP, OCCASIONS, RESIDUAL, Account, Step
from isoforward.attach.frozen import Call, time_frozen, time_serving
from isoforward.attach.modes import distances
from isoforward.attach.modules import compiled, innermost
from isoforward.attach.ranks import COMMUNICATION, Ranks, gradients_averaged_s, sharded
from isoforward.attach.sampling import TIMED, WHOLE, Sampling
from isoforward.base import units
from isoforward.base.device import device_of
from isoforward.base.disturbance import Disturbance
from isoforward.base.environment import environment
from isoforward.base.results import Comparison, Environment, Results, Row, RowFields, Verdict, row_of, unavailable
from isoforward.base.statistics import FEWEST, ratio_unpaired, summarise
from isoforward.base.vocabulary import Condition
from isoforward.measure.benchmark import Part
from isoforward.measure.passes import comparison_of, fields
from isoforward.serve.inference import DTYPES
from isoforward.show.phases import Phases

NAME = "attach"
MARGIN = 0.03
CLOSED = 0.05  # a timed step may differ by so much from one that is not, before it is said


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A training that has ended, as it was seen."""

    account: Account
    calls: Mapping[int, Sequence[Call]]  # forwards of the last timed step, by its calls of backward
    roots: Sequence[nn.Module]
    optimizers: Sequence[Optimizer]
    device: torch.device
    ranks: Ranks
    over: Disturbance
    flops: Mapping[str, int]  # by phase, of the step in which they were counted
    memory: Mapping[str, int]  # peak bytes, likewise
    sampling: Sampling  # what was asked for, or
    fixed: bool  # what a script cannot ask for otherwise
    lead: Optimizer | None = None  # whose steps were to be counted


def phases_of(watched: Watched, *, ended: bool, command: str = "") -> Phases:
    where = environment(command or NAME, watched.device)
    rows = _Rows(watched, where)
    training = list(rows.training())
    verdict = rows.verdict()
    serving: list[Row] = []
    compared: list[Comparison] = []
    others: list[Row] = []
    if ended:
        watched.ranks.leave({row.phase: row.value or 0.0 for row in training})
    if ended and watched.ranks.rank == 0:
        serving = list(rows.other_life())
        compared = list(rows.compared(serving))
        others = list(rows.between_ranks())
    found = (*training, *serving, *rows.occasions(), *rows.flops(), *rows.memory(), *rows.averaging(), *others)
    return Phases(
        results=Results(rows=found, environments={where.id: where}, verdicts=(verdict,), comparisons=tuple(compared))
    )


class _Rows:
    def __init__(self, watched: Watched, where: Environment) -> None:
        self.watched, self.where = watched, where
        steps = alike(watched.account.steps)
        self.timed = [step for step in steps if step.kind == TIMED]
        self.whole = [step for step in steps if step.kind == WHOLE] or self.timed
        self.calls = watched.calls.get(self.timed[0].backwards, []) if self.timed else []
        self.conditions = self._conditions(steps)

    def training(self) -> Iterator[Row]:
        for phase in IN_STEP:
            samples = [step.phases.get(phase, 0.0) for step in self.timed]
            if phase != RESIDUAL and any(samples):
                yield self._time(phase, samples)
        if self.timed:
            yield self._time("step", [step.seconds for step in self.whole])
            yield self._time(RESIDUAL, [step.phases.get(RESIDUAL, 0.0) for step in self.timed])

    def other_life(self) -> list[Row]:
        """Whatever goes wrong in it is a row: the training has ended well, and stays so."""
        if not self.calls:
            return []
        reason = "weights are sharded: a forward would wait for all processes"
        if self.watched.ranks.count == 1 or not sharded(self.watched.roots):
            try:
                return [*self.serving(), *self.modes()]
            except Exception as error:
                reason = f"its forward fails in inference: {type(error).__name__}: {error}".partition("\n")[0]
        about = self._about("inference", "forward", "step")
        return [row_of(NAME, about, unavailable(reason), quantity="time")]

    def serving(self) -> Iterator[Row]:
        clock = self.watched.account.clock
        yield self._time("forward", time_frozen(self.calls, clock), life="inference")
        if (prompt := self.calls[0].prompt) is None:
            return
        tokens = prompt.shape[1]
        served = time_serving(self.calls[0], clock)
        yield self._time("prefill", served["prefill"], life="inference", per="sequence", prompt=tokens)
        yield self._time("decode", served["decode"], life="inference", per="token", context=tokens + 1, cache=True)

    def modes(self) -> Iterator[Row]:
        for layers, distance in distances(self.calls).items():
            about = self._about("inference", "forward", "step", as_in_training=layers)
            yield row_of(NAME, about, quantity="between modes", value=distance)

    def compared(self, serving: Sequence[Row]) -> Iterator[Comparison]:
        whole_s = [step.seconds for step in self.whole]
        frozen_s = list(serving[0].samples) if serving else []
        if frozen_s and len(whole_s) >= FEWEST and min(*whole_s, *frozen_s) > 0:
            pair = self._part("training", "step"), self._part("inference", "forward")
            ratio = ratio_unpaired(whole_s, frozen_s)
            yield comparison_of(NAME, pair, ratio, MARGIN, 0.0, 0, environment=self.where.id)

    def occasions(self) -> Iterator[Row]:
        for occasion in OCCASIONS:
            if seconds := self.watched.account.occasions_s.get(occasion):
                yield row_of(NAME, self._about("training", occasion, "run"), quantity="time", value=seconds)

    def flops(self) -> Iterator[Row]:
        how: RowFields = {"quantity": "flops", "convention": "hardware"}
        if compiled(self.watched.roots):
            reason = "a compiled module dispatches no operators that could be counted"
            about = self._about("training", "step", "step")
            yield row_of(NAME, about, how, unavailable(reason))
        elif self.watched.flops:
            for phase, count in self.watched.flops.items():
                if phase in IN_STEP:
                    about = self._about("training", phase, "step")
                    yield row_of(NAME, about, how, value=float(count), provenance="counted")
            peak = peak_flops_per_s(self.calls[0]) if self.calls else None
            about = self._about("training", "step", "step", **({"peak_flops_per_s": peak} if peak else {}))
            yield row_of(NAME, about, how, value=float(sum(self.watched.flops.values())), provenance="counted")

    def memory(self) -> Iterator[Row]:
        for phase in IN_STEP:
            if phase in self.watched.memory:
                value = float(self.watched.memory[phase])
                about = self._about("training", phase, "step")
                yield row_of(NAME, about, quantity="memory", value=value, provenance="counted")

    def averaging(self) -> Iterator[Row]:
        seen = gradients_averaged_s(self.watched.roots) if self.timed and self.watched.ranks.count > 1 else None
        for how, seconds in zip(("in all", "beside the computation"), seen or (), strict=False):
            about = self._about("training", COMMUNICATION, "step", how=how)
            yield row_of(NAME, about, quantity="averaging", value=seconds)

    def between_ranks(self) -> Iterator[Row]:
        medians = self.watched.ranks.collect()
        phases = medians[0] if medians and medians[0] else {}
        for phase in phases:
            seconds = [one[phase] for one in medians if one is not None and one.get(phase)]
            about = self._about("training", phase, "step")
            if len(seconds) == len(medians):
                fastest, slowest = min(seconds), max(seconds)
                about = self._about("training", phase, "step", rank=seconds.index(slowest))
                ratios = tuple(one / fastest for one in seconds)
                yield row_of(NAME, about, quantity="between processes", value=slowest / fastest, samples=ratios)
            elif phase == "step":
                silent = " and ".join(str(rank) for rank, one in enumerate(medians) if not one)
                how: RowFields = {"value": None, "provenance": "unavailable"}
                yield row_of(NAME, about, how, quantity="between processes", reason=f"rank {silent} told nothing")

    def verdict(self) -> Verdict:
        account, over = self.watched.account, self.watched.over
        seen = account.count + account.stepped
        figures: dict[str, Condition] = {"elapsed_s": over.elapsed_s, "lost_share": over.lost_share}
        figures |= {"steps": seen, "timed": len(self.timed)}
        reasons = []
        if not self.timed:
            reasons.append(self.why_none(seen))
        elif len(self.timed) < FEWEST:
            way_out = "" if self.watched.fixed or self.watched.sampling.every == 1 else " or every=1"
            few = f"{len(self.timed)} of {seen} steps were timed, too few for an interval"
            reasons.append(f"{few}: train longer{way_out}")
        if over.disturbed:
            waited = f"threads of this training waited {over.lost_share:.0%} of the time for a processor"
            reasons.append(f"{waited}: run again with fewer threads, or with less beside it")
        if self.timed and self.whole is not self.timed:
            ratio = median(step.seconds for step in self.timed) / (median(step.seconds for step in self.whole) or 1.0)
            figures["timed_over_whole"] = ratio
            if len(self.whole) >= FEWEST <= len(self.timed) and abs(ratio - 1) > CLOSED:
                reasons.append(f"steps that were timed by phase took {ratio:.2f}x the time of those that were not")
        where = self.where.id
        return Verdict(experiment=NAME, trusted=not reasons, reasons=tuple(reasons), figures=figures, environment=where)

    def why_none(self, steps: int) -> str:
        account, lead = self.watched.account, self.watched.lead
        if steps:
            sampling = account.draws.sampling
            first = sampling.warmup + sampling.count_flops
            warm = f"the first {first} are left out as warm-up" if first else "none was drawn"
            return f"of {units.several(steps, 'optimizer step')} {warm}: train longer"
        if lead is not None and lead not in self.watched.optimizers and self.watched.optimizers:
            return f"the {type(lead).__name__} that was named never stepped, and another optimizer did"
        if account.backwards:
            return f"no optimizer of torch.optim stepped after {account.backwards} calls of backward"
        return "nothing was trained: no optimizer of torch.optim stepped, and backward was not called"

    def _part(self, life: str, phase: str) -> Part:
        return Part(life=life, phase=phase, per="step", conditions=self.conditions)

    def _about(self, life: str, phase: str, per: str, **more: Condition) -> RowFields:
        conditions = {**self.conditions, **more}
        return {
            "life": life, "phase": phase, "per": per, "conditions": conditions, "environment": self.where.id
        }  # fmt: skip

    def _time(
        self, phase: str, samples: list[float], *, life: str = "training", per: str = "step", **more: Condition
    ) -> Row:
        """With fewer samples than an interval needs, the median alone."""
        enough = len(samples) >= FEWEST
        few: RowFields = {"value": median(samples), "samples": tuple(samples)}
        found = fields(summarise(samples)) if enough else few
        return row_of(NAME, self._about(life, phase, per, **more), found, quantity="time")

    def _conditions(self, steps: list[Step]) -> dict[str, Condition]:
        roots, optimizers, ranks = self.watched.roots, self.watched.optimizers, self.watched.ranks
        weights = {id(weight): weight.numel() for root in roots for weight in root.parameters()}
        conditions: dict[str, Condition] = {
            "model": " and ".join(type(innermost(root)).__name__ for root in roots) or "not found",
            "parameters": sum(weights.values()),
            "optimizer": " and ".join(dict.fromkeys(type(one).__name__ for one in optimizers)) or "none",
        }
        if steps and steps[0].backwards > 1:
            conditions["micro_batches"] = steps[0].backwards
        if ranks.count > 1:
            conditions |= {"processes": ranks.count, "rank": ranks.rank}
        return conditions


def alike(steps: list[Step]) -> list[Step]:
    """Those of the most frequent number of micro-batches: the last of an epoch may have fewer."""
    backwards = Counter(step.backwards for step in steps if step.kind in (TIMED, WHOLE))
    most = max(backwards, key=lambda n: (backwards[n], n), default=0)
    return [step for step in steps if step.backwards == most]


def peak_flops_per_s(call: Call) -> float | None:
    """Of the dtype that its products are in; None where the device's is not known."""
    weight = next(call.module.parameters())
    known = device_of(weight.device).peaks()
    names = {dtype: name for name, dtype in DTYPES.items()}
    return None if known is None else known.peak_flops_per_s.get(names.get(call.autocast or weight.dtype, ""))
