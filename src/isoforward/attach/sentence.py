"""What was found in a watched training, for someone who reads one line: from its rows alone."""

from __future__ import annotations

import textwrap

from isoforward.attach.account import IN_STEP
from isoforward.attach.findings import CLOSED
from isoforward.attach.modes import ALL, OTHERS
from isoforward.base import units
from isoforward.base.results import Results, Row, at_most_one, select
from isoforward.show.phases import Phases

COLUMNS = 80


def shown(phases: Phases) -> str:
    """The table and the sentence beneath it."""
    return f"{phases}\n{textwrap.fill(sentence(phases.results), COLUMNS)}"


def sentence(found: Results) -> str:
    step = at_most_one(found, life="training", phase="step", quantity="time")
    if step is None or step.value is None:
        why = found.verdicts[0].reasons[0] if found.verdicts and found.verdicts[0].reasons else "it failed before one"
        return f"No training step was timed: {why}."
    takes = f"A training step takes {units.seconds(step.value)}{against_forward(found, step.value)}"
    more = [part for part in (largest(found, step.value), rate(found, step.value), slowest(found)) if part]
    return f"{'; '.join([takes, *more])}.{modes(found)}"


def against_forward(found: Results, step_s: float) -> str:
    forward = at_most_one(found, life="inference", phase="forward", quantity="time")
    if forward is None or not forward.value:
        return ""
    ratio = units.times(step_s / forward.value)
    for one in found.comparisons[:1]:
        ratio += f" ({units.times(one.low)} to {units.times(one.high)})"
    return f", {ratio} its forward in inference ({units.seconds(forward.value)})"


def largest(found: Results, step_s: float) -> str:
    """Of the step that is named; where those that were timed by phase took another time, of them."""
    parts = [row for row in select(found, life="training", quantity="time") if row.phase in IN_STEP]
    together = sum(value(row) for row in parts)
    if not together:
        return ""
    most = max(parts, key=value)
    if abs(together / step_s - 1) <= CLOSED:
        return f"{value(most) / step_s:.0%} of it is {most.phase}"
    return f"of those timed by phase, {units.seconds(together)} each, {value(most) / together:.0%} is {most.phase}"


def rate(found: Results, step_s: float) -> str:
    flops = at_most_one(found, life="training", phase="step", quantity="flops")
    if flops is None or not flops.value or not step_s:
        return ""
    told = f"it runs at {units.count(flops.value / step_s, 'FLOP/s')}"
    peak = flops.conditions.get("peak_flops_per_s")
    return f"{told}, {flops.value / step_s / float(peak):.1%} of the device's peak" if peak else told


def slowest(found: Results) -> str:
    rows = [row for row in select(found, quantity="between processes") if row.phase in IN_STEP and row.value]
    if not rows:
        return ""
    times = {row.phase: value(row) for row in select(found, life="training", quantity="time")}
    most = max(rows, key=lambda row: times.get(row.phase, 0.0) * (1 - 1 / value(row)))
    return f"processes differ most in {most.phase}: rank {most.conditions['rank']} takes {units.times(value(most))}"


def modes(found: Results) -> str:
    """What makes the outputs of training mode others than those of inference."""
    rows = {str(row.conditions["as_in_training"]): value(row) for row in select(found, quantity="between modes")}
    if not rows:
        return ""
    if not any(rows.values()):
        return " Outputs are bit for bit the same in both modes."
    causes = [name for name, distance in rows.items() if distance and name != ALL]
    why = ", ".join(causes) or OTHERS
    return f" Outputs in training mode differ by up to {rows[ALL]:.1%} of the largest, because of {why}."


def value(row: Row) -> float:
    return row.value or 0.0
