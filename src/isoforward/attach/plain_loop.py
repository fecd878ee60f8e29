"""Phase costs of a training loop of one's own, or of accelerate's: `with phase_costs(model, optimizer) as costs:`.

>>> import torch
>>> from isoforward import phase_costs
>>> model = torch.nn.Linear(16, 4)
>>> optimizer = torch.optim.AdamW(model.parameters())
>>> with phase_costs(model, optimizer, every=1) as costs:
...     for _ in range(12):
...         loss = model(torch.randn(8, 16)).square().mean()
...         loss.backward()
...         optimizer.step()
...         optimizer.zero_grad()
>>> [row.phase for row in costs.phases.rows if row.quantity == "time" and row.life == "training"]
['forward', 'loss', 'backward', 'optimizer', 'step', 'residual']
>>> costs.phases.against_forward("step").value > 1
True
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import Sampling
from isoforward.attach.sentence import shown
from isoforward.base.errors import BadInput
from isoforward.show.phases import Phases


class StepCosts:
    """What `phase_costs` gives: `phases` has the rows once the loop has ended; `print` shows them."""

    def __init__(self, measurement: Measurement, model: nn.Module | None, optimizer: Any) -> None:
        self.measurement, self.model, self.optimizer = measurement, model, optimizer
        self._phases: Phases | None = None

    def __enter__(self) -> StepCosts:
        roots = [] if self.model is None else [self.model]
        # Lightning Fabric and accelerate wrap what really steps
        self.measurement.start(roots, getattr(self.optimizer, "optimizer", self.optimizer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error of the loop stays what it is: the rows then have no other life."""
        self.measurement.stop()
        self._phases = self.measurement.phases(ended=error is None)

    @property
    def phases(self) -> Phases:
        """Rows, ratios against the forward of inference, and `write(path)`; BadInput while the loop runs."""
        if self._phases is None:
            raise BadInput("the costs of a loop are known once it has ended: read them after the `with` block")
        return self._phases

    def __repr__(self) -> str:
        """The table and the sentence, as a notebook shows what its last line gives; while the loop runs, that."""
        if self._phases is None:
            return "phase costs of a loop that has not ended"
        return shown(self.phases)


def phase_costs(
    model: nn.Module | None = None,
    optimizer: object = None,
    *,
    every: int = 4,
    warmup: int = 3,
    flops: bool = True,
) -> StepCosts:
    """Times data, transfer, forward, loss, backward, clipping and optimizer of the training steps in its block.

    One step in `every`, drawn at random, is timed by phase, the others as a whole; fewer, where timing them would take
    more than 0.3 % of the training. `warmup` steps are left out, and the operators of the next are counted if `flops`.
    `model` None is found by the weights that optimizers update; `optimizer` says whose steps are counted where there
    are several, else it is the first to step. Hooks are undone at the end. Weights and random state are what they would
    have been.
    """
    if not isinstance(model, nn.Module | None):
        raise BadInput(f"model is a {type(model).__name__}, and no torch.nn.Module: phase_costs(model, optimizer)")
    if optimizer is not None and not callable(getattr(optimizer, "step", None)):
        raise BadInput(f"optimizer is a {type(optimizer).__name__}, which has no step: phase_costs(model, optimizer)")
    sampling = Sampling(every=every, warmup=warmup, count_flops=flops)
    return StepCosts(Measurement(sampling, validation_by_mode=True), model, optimizer)
