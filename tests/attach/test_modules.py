"""Which modules a training step may call, and which of them are found by their weights."""

import torch
from torch import nn

from isoforward.attach import modules


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        self.criterion = nn.MSELoss()
        self.inner = nn.Sequential(nn.Linear(2, 2))


def test_modules_without_weights_to_train_are_no_forward() -> None:
    wrapper = Wrapper()
    assert list(modules.callable_modules(wrapper)) == [wrapper, wrapper.parts[0], wrapper.inner]
    assert list(modules.callable_modules(nn.ReLU())) == []


def test_what_torch_compile_made_is_hooked_from_outside_alone() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    assert list(modules.callable_modules(compiled)) == [compiled]  # type: ignore[arg-type]
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    assert list(modules.callable_modules(in_place)) == []


def test_modules_are_found_by_the_weights_that_are_updated() -> None:
    wrapper, other = Wrapper(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(wrapper.inner.parameters())
    found = modules.trained_by([optimizer])
    assert any(one is wrapper for one in found) and not any(one is other for one in found)
