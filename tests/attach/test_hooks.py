"""What is hooked and what is not: only what a training step calls from outside."""

import copy
import io

import torch
from torch import nn

from isoforward.attach import hooks
from isoforward.attach.account import Account
from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import Sampling
from tests.attach import planted_training as plant
from tests.attach.planted_training import PlantedClock


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        self.criterion = nn.MSELoss()
        self.inner = nn.Sequential(nn.Linear(2, 2))


def watched() -> hooks.Hooks:
    return hooks.Hooks(Account(PlantedClock(), Sampling(every=1, warmup=0, count_flops=False)))


def test_modules_without_weights_to_train_are_no_forward() -> None:
    wrapper = Wrapper()
    assert list(hooks.callable_modules(wrapper)) == [wrapper, wrapper.parts[0], wrapper.inner]
    assert list(hooks.callable_modules(nn.ReLU())) == []


def test_what_torch_compile_made_is_hooked_from_outside_alone() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    assert list(hooks.callable_modules(compiled)) == [compiled]  # type: ignore[arg-type]
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    assert list(hooks.callable_modules(in_place)) == []


def test_a_watched_model_is_copied_and_pickled_like_any_other() -> None:
    model, watching = nn.Linear(2, 2), watched()
    watching.watch_module(model)
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


def test_modules_are_found_by_the_weights_that_are_updated() -> None:
    wrapper, other = Wrapper(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(wrapper.inner.parameters())
    found = hooks.trained_by([optimizer])
    assert any(one is wrapper for one in found) and not any(one is other for one in found)


def test_what_was_replaced_is_put_back() -> None:
    watching, owner = watched(), nn.Linear(2, 2)
    watching.time(owner, "extra_repr", "logging")
    watching.time(torch.nn.utils, "clip_grad_value_", "clipping")
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
