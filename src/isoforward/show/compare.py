"""From rows to what they say: both lives side by side, ratios with intervals, utilisation, one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from isoforward.base import units
from isoforward.base.errors import BadInput
from isoforward.base.results import MOST_REASONS, Results, Row, at_most_one, select
from isoforward.base.statistics import Judgement, Ratio
from isoforward.base.vocabulary import TRAINING, Condition

SERVED = ("forward", "prefill", "decode")
CLOSED = 0.01  # of a step: a residual that is certainly beyond it is said


@dataclass(frozen=True, kw_only=True)
class Line:
    """One phase of one life: what it costs, per execution and per token, and against the shared forward."""

    life: str
    phase: str
    label: str
    tokens: float  # that one execution handles
    time: Row | None = None
    flops: Row | None = None
    memory: Row | None = None
    bytes: Row | None = None
    against_forward: Judgement | None = None  # in time, per execution on the same tokens
    share: float | None = None  # of the whole training step

    @property
    def time_per_token_s(self) -> float | None:
        return None if self.time is None or self.time.value is None else self.time.value / self.tokens

    @property
    def tokens_per_s(self) -> float | None:
        return 1 / self.time_per_token_s if self.time_per_token_s else None

    @property
    def flops_per_s(self) -> float | None:
        return self._per_s(self.flops)

    @property
    def bytes_per_s(self) -> float | None:
        return self._per_s(self.bytes)

    def _per_s(self, count: Row | None) -> float | None:
        if self.time is None or count is None or not self.time.value or not count.value:
            return None
        return count.value / self.time.value

    @property
    def costs(self) -> list[str]:
        """Time, that of a token, FLOPs and peak memory as text, empty where they are not known."""
        return [
            "" if self.time is None or self.time.value is None else units.seconds(self.time.value),
            "" if self.time_per_token_s is None else units.seconds(self.time_per_token_s),
            "" if self.flops is None or not self.flops.value else units.count(self.flops.value),
            "" if self.memory is None or self.memory.value is None else units.size(self.memory.value),
        ]


@dataclass(frozen=True, kw_only=True)
class BothLives:
    results: Results
    conditions: Mapping[str, Condition]
    training: list[Line]
    step: Line
    inference: list[Line]
    time_ratio: Ratio  # a training step against the frozen forward on the same batch
    adamw_ratio: Ratio | None  # of the same step with AdamW, where another optimizer trained
    adamw_flops_ratio: float | None  # whose update holds no matrix product
    flops_ratio: float | None  # None where the forward could not be counted
    memory_ratio: float | None
    decode_ratio: float  # a decoded token against a trained one, in time
    residual: float  # of the step
    warnings: list[str]

    @property
    def headline(self) -> str:
        costs = [f"{with_ends(self.time_ratio)} its forward pass in time"]
        if self.flops_ratio is not None:
            costs.append(f"{units.times(self.flops_ratio)} in FLOPs")
        if self.memory_ratio is not None:
            costs.append(f"{units.times(self.memory_ratio)} in memory")
        told = " and ".join(filter(None, (", ".join(costs[:-1]), costs[-1])))
        decode = next(line for line in self.inference if line.phase == "decode")
        assert decode.time_per_token_s is not None and self.step.time_per_token_s is not None
        if self.adamw_ratio is not None:
            told += f" (with AdamW in place of {self.conditions['optimizer']}: {with_ends(self.adamw_ratio)} in time"
            told += ")" if self.adamw_flops_ratio is None else f", {units.times(self.adamw_flops_ratio)} in FLOPs)"
        return (
            f"Training this model costs {told}; a decoded token takes "
            f"{units.seconds(decode.time_per_token_s)}, {units.times(self.decode_ratio)} a trained one "
            f"({units.seconds(self.step.time_per_token_s)}).{self.closeness}"
        )

    @property
    def closeness(self) -> str:
        """How far served log-probabilities are from training's; empty where that was not measured."""
        apart = at_most_one(self.results, quantity="difference", statistic="largest")
        if apart is None or apart.value is None:
            return ""
        tokens = apart.conditions["new_tokens"]
        return f" Served log-probabilities are within {apart.value:.1e} nat of training's, over {tokens} tokens."


def with_ends(ratio: Ratio) -> str:
    few = "" if ratio.interval.reached else "too few rounds, "
    return f"{units.times(ratio.value)} ({few}{units.times(ratio.low)} to {units.times(ratio.high)})"


def open_account(residual: Row, step_s: float) -> bool:
    """Whether the whole of its interval lies beyond what a closed account may leave."""
    ends = (residual.value if end is None else end for end in (residual.low, residual.high))
    low, high = ((end or 0.0) / step_s for end in ends)
    return low > CLOSED or high < -CLOSED


def compare(results: Results) -> BothLives:
    """Raises BadInput where the two lives cannot be compared: unlike forwards, a life that is missing."""
    identity = at_most_one(results, quantity="identity")
    if identity is None:
        raise BadInput("not compared: no row shows that both lives run the same forward")
    if identity.value:
        raise BadInput(
            f"not compared: {identity.value:,.0f} logits of the frozen forward are not those of training's forward"
        )
    step_time = at_most_one(results, life="training", phase="step", quantity="time", cold=None, in_place_of=None)
    frozen = at_most_one(results, life="inference", phase="forward", quantity="time", cold=None)
    if step_time is None or frozen is None or step_time.value is None or frozen.value is None:
        raise BadInput("not compared: the time of a training step and of the frozen forward are not both there")
    tokens = float(step_time.conditions["tokens"] or 1)
    training = [line(results, "training", phase, phase, tokens, frozen, step_time.value) for phase in TRAINING]
    flops = {one.phase: one.flops.value or 0.0 for one in training if one.flops is not None}
    peaks = [one.memory for one in training if one.memory is not None]
    against = results.judge(step_time, frozen)
    trained_by = step_time.conditions.get("optimizer")
    with_adamw = trained_by and at_most_one(results, phase="step", quantity="time", in_place_of=trained_by)
    whole = line(results, "training", "step", "whole step", tokens, frozen, step_time.value)
    step = replace(whole, memory=max(peaks, key=lambda row: row.value or 0.0, default=None))
    serving = [
        line(results, "inference", "forward", "forward, same batch", tokens, frozen, None),
        line(results, "inference", "prefill", "prefill", 0, None, None),
        line(results, "inference", "decode", "decode", 1, None, None),
    ]
    forward_memory, decode = serving[0].memory, serving[2]
    if step.time_per_token_s is None or decode.time_per_token_s is None:
        raise BadInput("not compared: the time of a decoded token is not there")
    residual = at_most_one(results, life="training", phase="residual", quantity="time")
    share = (residual.value or 0.0) / step_time.value if residual else 0.0
    warnings = results.doubts
    if residual is not None and open_account(residual, step_time.value):
        warnings = [f"phases and whole step differ by {share:+.1%} of the step", *warnings][:MOST_REASONS]

    def against_forward(phases: Iterable[str]) -> float | None:
        """FLOPs of a part of the step."""
        return sum(flops[each] for each in phases) / flops["forward"] if flops.get("forward") else None

    return BothLives(
        results=results,
        conditions=step_time.conditions,
        training=training,
        step=step,
        inference=serving,
        time_ratio=against.ratio,
        adamw_ratio=results.judge(with_adamw, frozen).ratio if with_adamw else None,
        adamw_flops_ratio=against_forward(flops.keys() - {"optimizer"}) if with_adamw else None,
        flops_ratio=against_forward(flops),
        memory_ratio=(
            step.memory.value / forward_memory.value
            if step.memory and step.memory.value and forward_memory and forward_memory.value
            else None
        ),
        decode_ratio=decode.time_per_token_s / step.time_per_token_s,
        residual=share,
        warnings=warnings,
    )


def line(
    results: Results, life: str, phase: str, label: str, tokens: float, forward: Row | None, whole_s: float | None
) -> Line:
    at: dict[str, object] = {"life": life, "phase": phase, "context": None, "category": None, "cold": None}
    at["in_place_of"] = None  # the usual optimizer, beside the one that trained
    time = at_most_one(results, **at, quantity="time")
    share = None
    if time is not None and time.value is not None and whole_s is not None:
        share = time.value / whole_s
    return Line(
        life=life,
        phase=phase,
        label=label,
        tokens=tokens or float((time.conditions.get("tokens") if time else 1) or 1),
        time=time,
        flops=at_most_one(results, **at, quantity="flops", convention="model"),
        memory=at_most_one(results, **at, quantity="memory"),
        bytes=at_most_one(results, **at, quantity="bytes"),
        against_forward=results.judge(time, forward) if time and forward and time.samples and forward.samples else None,
        share=share,
    )


def cache_curve(results: Results) -> dict[bool, list[tuple[int, Row]]]:
    """Time of one more token by the tokens before it: with a KV cache (True), and without."""
    curve: dict[bool, list[tuple[int, Row]]] = {True: [], False: []}
    for row in select(results, phase="decode", quantity="time"):
        context, cache = row.conditions.get("context"), row.conditions.get("cache")
        if isinstance(context, int) and isinstance(cache, bool):
            curve[cache].append((context, row))
    return {cache: sorted(points, key=lambda point: point[0]) for cache, points in curve.items()}


def memory_ledger(results: Results, life: str) -> dict[str, float]:
    """Bytes by category at the peak, with `measured peak` and `unexplained`."""
    found = {}
    for row in select(results, life=life, quantity="memory"):
        category = row.conditions.get("category")
        if isinstance(category, str) and row.value is not None:
            found[category] = row.value
    return found
