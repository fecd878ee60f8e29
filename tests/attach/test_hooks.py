"""What is hooked and what is not: only what a training step calls from outside."""

import copy
import io
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from isoforward.attach import hooks
from isoforward.attach.account import Account
from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import Sampling
from tests.attach import planted_training as plant
from tests.attach.planted_training import PlantedClock


def watched() -> hooks.Hooks:
    return hooks.Hooks(Account(PlantedClock(), Sampling(every=1, warmup=0, count_flops=False)))


def test_a_watched_model_is_copied_and_pickled_like_any_other() -> None:
    model, watching = nn.Linear(2, 2), watched()
    watching.watch_module(model)
    watching.run_begins()
    copied = copy.deepcopy(model)
    assert copied(torch.ones(1, 2)).shape == (1, 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    watching.undo()
    assert torch.equal(torch.load(file, weights_only=False)(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_only_another_device_is_a_transfer() -> None:
    here = torch.ones(2)
    for arguments, moves in (("cpu", False), (torch.float64, False), ("meta", True), (torch.ones(1), False)):
        assert hooks.moves(here, (arguments,), {}) is moves
    assert hooks.moves(here, (), {"device": "meta"})


def test_what_was_replaced_is_put_back() -> None:
    watching, owner = watched(), nn.Linear(2, 2)
    watching.time(owner, "extra_repr", "logging")
    watching.time(torch.nn.utils, "clip_grad_value_", "clipping")
    watching.run_begins()
    assert "extra_repr" in vars(owner)
    watching.undo()
    assert "extra_repr" not in vars(owner)
    assert torch.nn.utils.clip_grad_value_ is torch.nn.utils.clip_grad.clip_grad_value_


def test_validation_is_seen_where_no_step_is_timed() -> None:
    clock = PlantedClock()
    model = plant.Model(clock)
    optimizer = plant.update(model, clock)
    measurement = Measurement(Sampling(every=10**9, warmup=1, count_flops=False), clock=clock, validation_by_mode=True)
    measurement.start([model], optimizer)
    for _ in range(3):
        for batch in plant.loader(clock, 4):
            model(batch).sum().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model(torch.ones(2, 4))
        model.train()
    measurement.stop()
    account = measurement.account
    assert [step.seconds for step in account.steps] == [
        plant.fetched(1) + plant.FORWARD + plant.BACKWARD + plant.UPDATE
    ] * 12
    assert account.occasions_s == {"validation": 3 * plant.FORWARD}


def test_a_module_that_is_first_called_late_is_found_in_the_next_timed_step() -> None:
    clock = PlantedClock()
    parts = nn.ModuleDict({"generator": plant.Model(clock), "critic": plant.Model(clock)})
    optimizer = plant.update(parts, clock)
    measurement = Measurement(Sampling(every=2, warmup=1, count_flops=False), clock=clock, validation_by_mode=True)
    measurement.start([parts], optimizer)
    for index, batch in enumerate(plant.loader(clock, 20)):
        out = parts["generator"](batch)
        (parts["critic"](out) if index >= 6 else out).sum().backward()
        optimizer.step()
    measurement.stop()
    forwards = [step.phases["forward"] for step in measurement.account.steps if step.phases]
    assert len(forwards) >= 8 and set(forwards) == {plant.FORWARD, 2 * plant.FORWARD}
    assert forwards[-1] == 2 * plant.FORWARD


def test_a_part_that_takes_the_place_of_the_whole_is_found_again() -> None:
    clock = PlantedClock()
    whole = nn.ModuleDict({"part": plant.Model(clock)})
    whole.forward = lambda batch: whole["part"](batch)  # type: ignore[method-assign]
    optimizer = plant.update(whole, clock)
    measurement = Measurement(Sampling(every=1, warmup=0, count_flops=False), clock=clock, validation_by_mode=True)
    measurement.start([whole], optimizer)
    for index, batch in enumerate(plant.loader(clock, 12)):
        called = whole if index < 6 else whole["part"]
        called(batch).sum().backward()
        optimizer.step()
    measurement.stop()
    forwards = [step.phases.get("forward") for step in measurement.account.steps]
    assert forwards == [plant.FORWARD] * 6 + [None] + [plant.FORWARD] * 5


def test_gradients_are_zeroed_by_the_optimizer_however_it_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PlantedClock()
    zero_grad = torch.optim.Optimizer.zero_grad

    def slow(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        clock.take(plant.CALLBACK)
        zero_grad(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", slow)
    model = plant.Model(clock)
    optimizer = plant.update(model, clock)
    wrapped: Any = LightningOptimizer(optimizer)
    measurement = Measurement(Sampling(every=2, warmup=1, count_flops=False), clock=clock, validation_by_mode=True)
    measurement.start([model], optimizer)
    for index, batch in enumerate(plant.loader(clock, 12)):
        model(batch).sum().backward()
        optimizer.step()
        (wrapped if index % 2 else optimizer).zero_grad()
    measurement.stop()
    timed = [step.phases["optimizer"] for step in measurement.account.steps if step.phases]
    assert timed == [plant.UPDATE + plant.CALLBACK] * len(timed) and len(timed) >= 5
