"""A loop of accelerate in the `with` block: its prepared loader, wrapped optimizer, own backward and accumulation."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from isoforward import phase_costs
from isoforward.attach.measurement import Measurement
from isoforward.attach.plain_loop import StepCosts
from isoforward.attach.sampling import Sampling
from tests.attach import planted_training as plant

accelerate = pytest.importorskip("accelerate")
ALL = Sampling(every=1, warmup=0, count_flops=False)


def prepared(clock: plant.PlantedClock, batches: int, accumulate: int) -> Any:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = plant.Model(clock)
    return accelerator, *accelerator.prepare(model, plant.update(model, clock), plant.loader(clock, batches))


def epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any, clock: plant.PlantedClock) -> None:
    criterion = plant.Criterion(clock)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(batch)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("accumulate", "micro_batches"), [(1, [1] * 7), (3, [3, 3, 1])])
def test_what_is_planted_in_a_phase_is_found_there_and_nowhere_else(accumulate: int, micro_batches: list[int]) -> None:
    clock = plant.PlantedClock()
    accelerator, model, optimizer, loader = prepared(clock, 7, accumulate)
    measurement = Measurement(ALL, clock=clock, validation_by_mode=True)
    with plant.slow_clipping(clock), StepCosts(measurement, model, optimizer) as costs:
        epoch(accelerator, model, optimizer, loader, clock)
    expected = [plant.planted(n) for n in micro_batches]
    batches = [expected_n + (at == 0) - (at == len(expected) - 1) for at, expected_n in enumerate(micro_batches)]
    for step, fetched in zip(expected, batches, strict=True):  # its loader fetches one batch ahead
        step["data"] = plant.fetched(fetched)
    assert [plant.told(step.phases) for step in measurement.account.steps] == [plant.told(step) for step in expected]
    assert costs.phases.time("inference", "forward").value == micro_batches[0] * plant.FORWARD


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_weights_are_what_they_are_without_it(mixed: str) -> None:
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        clock = plant.PlantedClock()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed)
        own = plant.Model(clock)
        model, optimizer, loader = accelerator.prepare(own, plant.update(own, clock), plant.loader(clock, 24))
        with phase_costs(model, optimizer, every=2, warmup=1) if watched else nullcontext() as costs:
            epoch(accelerator, model, optimizer, loader, clock)
        weights.append(own.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert costs is not None and costs.phases.time("inference", "forward").value
