"""What each phase of a training step costs, and the forward alone, of any `nn.Module`: a few lines of Python, no files.

>>> import torch
>>> from torch import nn
>>> from isoforward import compare_phases
>>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
>>> batch = torch.randn(64, 16), torch.randint(4, (64,))
>>> phases = compare_phases(model, batch, loss=nn.functional.cross_entropy, repeats=5)
>>> [(row.life, row.phase) for row in phases.rows if row.quantity == "time"]  # doctest: +NORMALIZE_WHITESPACE
[('training', 'forward'), ('training', 'loss'), ('training', 'backward'), ('training', 'optimizer'),
 ('training', 'step'), ('training', 'residual'), ('inference', 'forward')]
>>> step = phases.against_forward("step")  # the paired ratio of times, with its interval
>>> step.low <= step.value <= step.high
True
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from isoforward.base.config import MeasureConfig
from isoforward.base.device import device_of
from isoforward.base.environment import environment
from isoforward.base.results import Comparison, Results, Row, RowFields, row_of
from isoforward.base.vocabulary import TRAINING, Condition
from isoforward.measure.benchmark import Part, measure, phased, timed
from isoforward.measure.passes import comparison, derived_fields, fields
from isoforward.measure.trust import findings, verdict
from isoforward.model import steps
from isoforward.model.loss import next_token_loss
from isoforward.show.phases import Phases

NAME = "compare_phases"


@torch.enable_grad()  # whatever the caller has switched off: a step needs gradients
def compare_phases(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    optimizer: Optimizer | None = None,
    loss: Callable[[Any, Tensor], Tensor] = next_token_loss,
    precision: float = 0.03,
    budget: float = 20.0,
    repeats: int | None = None,
    warmup: int = 3,
    seed: int = 0,
) -> Phases:
    """Times forward, loss, backward and optimizer of a training step, and the forward of a frozen copy.

    `batch` is (inputs, targets), on the model's device; `loss` takes what the model gives (of a Transformers model its
    logits) and the targets, and is that of the next token unless told. `optimizer` None is AdamW. Everything runs on
    copies: model, optimizer, gradients and random state stay as they were. Measuring ends when every time is known to
    `precision`, its interval's relative half-width, or after `budget` seconds; or after `repeats` pairs, at least 5.
    """
    plan = MeasureConfig(precision=precision, budget=budget, repeats=repeats, warmup=warmup)
    inputs, targets = batch
    master, updater = copy.deepcopy((model, optimizer))
    updater = updater or AdamW(master.parameters())
    frozen = copy.deepcopy(master).eval().requires_grad_(False)
    clock = device_of(inputs.device)
    conditions: dict[str, Condition] = {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": len(inputs),
    }

    def criterion(output: object, targets: Tensor) -> Tensor:
        return loss(getattr(output, "logits", output), targets)

    def step(phase: steps.Phase = steps.unmeasured) -> None:
        steps.train_step(master, updater, inputs, targets, criterion=criterion, phase=phase)

    def part(life: str, phase: str) -> Part:
        return Part(life=life, phase=phase, per="step", conditions=conditions)

    parts = phased(clock, {phase: part("training", phase) for phase in TRAINING}, step)
    whole = timed(clock, part("training", "step"), step)
    served = timed(clock, part("inference", "forward"), torch.inference_mode()(lambda: frozen(inputs)))
    (forward,), (step_part,) = served.parts, whole.parts
    pairs = [*((one, forward) for one in parts.parts), (step_part, forward), (parts.parts[0], step_part)]
    master.train()
    where = environment(NAME, inputs.device)
    devices = [inputs.device] if inputs.is_cuda else []
    with torch.random.fork_rng(devices):
        found = measure([parts, whole, served], pairs, plan, seed=seed)
    rows = [row(one, fields(found.estimate(one)), where.id) for one in (*parts.parts, step_part, forward)]
    residual = [whole_s - sum(parts_s) for whole_s, *parts_s in found.paired(step_part, *parts.parts)]
    rows.insert(len(TRAINING) + 1, row(part("training", "residual"), derived_fields(residual), where.id))
    compared: list[Comparison] = [comparison(NAME, pair, found, where.id) for pair in pairs]
    results = Results(
        rows=tuple(rows),
        environments={where.id: where},
        verdicts=(verdict(NAME, [findings(found)], plan, environment=where.id),),
        comparisons=tuple(compared),
    )
    return Phases(results=results)


def row(part: Part, found: RowFields, environment_id: str) -> Row:
    return row_of(NAME, part.about, found, quantity="time", environment=environment_id)
