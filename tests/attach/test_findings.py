"""From watched steps to rows: which steps they are of, and what is said where too little was seen."""

import torch
from torch import nn

from isoforward.attach import findings
from isoforward.attach.account import Step
from isoforward.attach.sampling import TIMED, WARMUP
from tests.attach.planted_training import watched_loop as train


def test_rows_are_of_steps_with_as_many_micro_batches_as_most() -> None:
    def step(kind: str, backwards: int) -> Step:
        return Step(kind=kind, seconds=1.0, phases={}, backwards=backwards)

    steps = [step(TIMED, 3), step(TIMED, 3), step(TIMED, 1), step(WARMUP, 1), step(WARMUP, 1)]
    assert findings.alike(steps) == steps[:2]


def test_a_short_training_gives_medians_without_an_interval_and_says_so() -> None:
    costs = train(nn.Linear(6, 2), 5, every=1, warmup=2)
    row = costs.phases.time("training", "forward")
    assert row.value is not None and row.interval is None and len(row.samples) == 2
    assert "2 of 5 steps were timed" in costs.phases.results.verdicts[0].reasons[0]


def test_a_forward_that_fails_in_inference_is_a_row_and_no_error() -> None:
    class TrainsOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("only in training")
            return self.linear(x)  # type: ignore[no-any-return]

    model = TrainsOnly()
    costs = train(model, 8, every=1, warmup=1)
    row = costs.phases.time("inference", "forward")
    assert row.value is None and "RuntimeError: only in training" in str(row.reason)
    assert "A training step takes" in str(costs) and not costs.phases.results.comparisons
    assert model.training
