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
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from isoforward.base.config import MeasureConfig
from isoforward.base.device import device_of
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
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
    batch: object,
    *,
    optimizer: Optimizer | None = None,
    loss: Callable[..., Tensor] | None = None,
    precision: float = 0.03,
    budget: float = 20.0,
    repeats: int | None = None,
    warmup: int = 3,
    seed: int = 0,
) -> Phases:
    """Times forward, loss, backward and optimizer of a training step, and the forward of a frozen copy.

    `batch` is (inputs, targets), on the model's device: inputs in a mapping are keyword arguments of the model, in a
    tuple or list positional ones. `loss` takes what the model gives (of a Transformers model its logits) and the
    targets, and is that of the next token unless told. A batch that is no pair goes to the model whole, by keyword
    where it is a mapping, and `loss` takes it in place of the targets; without one the model gives its own loss, as
    Transformers' do for `labels`, and its time is the forward's. `optimizer` None is AdamW.

    Everything runs on copies: model, optimizer, gradients and random state stay as they were. Measuring ends when every
    time is known to `precision`, its interval's relative half-width, or after `budget` seconds; or after `repeats`
    pairs, at least 5. Raises BadInput where no step can be taken on the batch.
    """
    plan = MeasureConfig(precision=precision, budget=budget, repeats=repeats, warmup=warmup)
    pair = batch if isinstance(batch, tuple | list) and len(batch) == 2 else None
    inputs, targets = (batch, batch) if pair is None else pair
    rate: Callable[..., Tensor] = loss or (loss_of_the_model if pair is None else next_token_loss)
    master, updater = copy.deepcopy((Called(model), optimizer))
    updater = updater or AdamW(master.parameters())
    if isinstance(updater, LBFGS):
        raise BadInput("optimizer: LBFGS runs forward and backward within its own step, so they cannot be told apart")
    frozen = copy.deepcopy(master).eval().requires_grad_(False)
    first = next((leaf for leaf in tree_leaves(as_mapping(inputs)) if isinstance(leaf, Tensor)), None)
    if first is None:
        raise BadInput(f"batch: no tensor is in its inputs, a {type(inputs).__name__}; pass (inputs, targets)")
    clock = device_of(first.device)
    conditions: dict[str, Condition] = {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": len(first) if first.dim() else 1,
    }

    def criterion(output: object, targets: object) -> Tensor:
        return rate(output if pair is None else getattr(output, "logits", output), targets)

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
    where = environment(NAME, first.device)
    devices = [first.device] if first.is_cuda else []
    with torch.random.fork_rng(devices):
        refuse_what_cannot_be_trained(master, inputs, targets, criterion)
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


class Called(nn.Module):
    """The model as it is called on what a batch holds for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: object) -> object:
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(*inputs) if type(inputs) is tuple or type(inputs) is list else self.model(inputs)


def as_mapping(inputs: object) -> object:
    """A dataclass or another object by its fields, for whoever looks for tensors in it."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return inputs if isinstance(inputs, Tensor | tuple | list) else getattr(inputs, "__dict__", inputs)


def loss_of_the_model(output: object, batch: object) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise BadInput("the model gives no loss of its own for this batch; pass loss=, or (inputs, targets)")
    return found


def refuse_what_cannot_be_trained(
    model: nn.Module, inputs: object, targets: object, criterion: Callable[..., Tensor]
) -> None:
    output = told_of("the model fails on these inputs", lambda: model(inputs))
    found = told_of("the loss fails on what the model gives and these targets", lambda: criterion(output, targets))
    if not isinstance(found, Tensor) or found.numel() != 1:
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise BadInput(f"loss: it gives {shape}, and a step needs one number; take its mean")
    if not found.requires_grad:
        raise BadInput("loss: no parameter that is trained leads to it; set requires_grad")
    if not found.isfinite():
        raise BadInput(f"the loss of this batch is {found.item()}; a step on it would only spoil the weights")
    found.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and gradient.is_sparse:
            raise BadInput(f"the gradient of {name.removeprefix('model.')} is sparse, and torch takes no norm of such")
        if gradient is not None and not gradient.isfinite().all():
            raise BadInput(f"the gradient of {name.removeprefix('model.')} is not finite on this batch")


def told_of(what: str, attempt: Callable[[], object]) -> object:
    try:
        return attempt()
    except BadInput:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise BadInput(f"batch: {what}: {type(error).__name__}: {first}") from error


def row(part: Part, found: RowFields, environment_id: str) -> Row:
    return row_of(NAME, part.about, found, quantity="time", environment=environment_id)
