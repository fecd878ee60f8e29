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
import gc
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from isoforward.base.environment import environment, reference_kernel
from isoforward.base.errors import BadInput
from isoforward.base.estimates import Ratio, interleaved, ratio
from isoforward.base.results import TRAINING, Results, Row, write
from isoforward.base.stopwatch import Stopwatch, clock_for, spent
from isoforward.measure.case import Laps, timed
from isoforward.measure.trust import Watch, judge_trust
from isoforward.model import steps
from isoforward.model.loss import next_token_loss


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The rows of one comparison, with the environment they hold in and the verdict on them. `print` shows them."""

    results: Results

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.results.rows

    @property
    def trusted(self) -> bool:
        """Whether the machine was quiet enough for the numbers to be believed; the verdict has the reasons."""
        return all(verdict.trusted for verdict in self.results.verdicts)

    def time(self, life: str, phase: str) -> Row:
        """Of `training`: forward, loss, backward, optimizer, step, residual; of `inference`: forward."""
        for row in self.rows:
            if (row.life, row.phase, row.quantity) == (life, phase, "time"):
                return row
        raise BadInput(f"no time of {life} {phase} was measured")

    def against_forward(self, phase: str) -> Ratio:
        """Time of a phase of training, or of its whole `step`, against the forward of inference, round by round."""
        return ratio(self.time("training", phase).samples, self.time("inference", "forward").samples)

    def write(self, path: Path | str) -> None:
        """Appends to a results.jsonl, which `isoforward.read` and `isoforward report` open."""
        write(path, [*self.results.environments.values(), *self.results.rows, *self.results.verdicts])

    def __str__(self) -> str:
        from isoforward.show.tables import show_rows

        shown = io.StringIO()
        show_rows(Console(file=shown, width=80), self.results)
        return shown.getvalue()


def compare_phases(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    optimizer: Optimizer | None = None,
    loss: Callable[[Any, Tensor], Tensor] = next_token_loss,
    repeats: int = 20,
    warmup: int = 3,
    seed: int = 0,
) -> Phases:
    """Times forward, loss, backward and optimizer of a training step, and the forward of a frozen copy.

    `batch` is (inputs, targets), on the model's device; `loss` takes what the model gives (of a Transformers model its
    logits) and the targets, and is that of the next token unless told. `optimizer` None is AdamW. Everything runs on
    copies: model, optimizer, gradients and random state stay as they were. `repeats` interleaved rounds, at least 5,
    follow `warmup` uncounted ones.
    """
    inputs, targets = batch
    master, updater = copy.deepcopy((model, optimizer))
    updater = updater or AdamW(master.parameters())
    frozen = copy.deepcopy(master).eval().requires_grad_(False)
    clock = clock_for(inputs.device)
    stopwatch = Stopwatch(clock)

    def criterion(output: Any, targets: Tensor) -> Tensor:
        return loss(getattr(output, "logits", output), targets)

    def step(phase: steps.Phase = steps.unmeasured) -> None:
        steps.train_step(master, updater, inputs, targets, criterion=criterion, phase=phase)

    @torch.inference_mode()
    def forward() -> object:
        return frozen(inputs)

    candidates = {
        "phased": lambda: stopwatch.lap(step),
        "whole": lambda: {"step": spent(clock, step)},
        "served": lambda: {"forward": spent(clock, forward)},
    }
    master.train()
    where = environment("compare_phases", inputs.device)
    devices = [inputs.device] if inputs.is_cuda else []
    with Watch(reference_kernel(inputs.device)) as watch, torch.random.fork_rng(devices):
        interleaved(candidates, warmup, seed=seed)
        gc.collect()
        laps = interleaved(candidates, repeats, seed=seed + 1)
    rows = [replace(row, environment=where.id) for row in told(laps, model, inputs)]
    verdict = judge_trust("compare_phases", rows, watch, environment=where.id)
    return Phases(results=Results(rows=tuple(rows), environments={where.id: where}, verdicts=(verdict,), warnings=()))


def told(laps: Laps, model: nn.Module, inputs: Tensor) -> Iterator[Row]:
    about: dict[str, Any] = {
        "experiment": "compare_phases",
        "per": "step",
        "conditions": {
            "model": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch": len(inputs),
        },
    }
    for phase in TRAINING:
        yield Row(**about, life="training", phase=phase, **timed([lap[phase] for lap in laps["phased"]]))
    wholes = [lap["step"] for lap in laps["whole"]]
    parts = [sum(lap[phase] for phase in TRAINING) for lap in laps["phased"]]
    residual = [whole - part for whole, part in zip(wholes, parts, strict=True)]
    yield Row(**about, life="training", phase="step", **timed(wholes))
    yield Row(**about, life="training", phase="residual", **timed(residual))
    yield Row(**about, life="inference", phase="forward", **timed([lap["forward"] for lap in laps["served"]]))
