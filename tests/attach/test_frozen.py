"""The other life: the same forwards in eval mode, and modules that are afterwards what they were."""

from typing import Any

import torch
from torch import Tensor, nn

from isoforward.attach.frozen import REPEATS, WARMUP, Call, time_frozen, unlike_in_training
from tests.attach.planted_training import PlantedClock


class Remembers(nn.Module):
    """Keeps a table that its forward made, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.table: Tensor | None = None
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        self.table = torch.ones(3) if self.table is None else self.table
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return self.norm(self.linear(x)) * self.table  # type: ignore[no-any-return]


def test_the_module_can_be_trained_afterwards_and_is_what_it_was() -> None:
    module = Remembers()
    module.linear.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    seconds = time_frozen([Call.of(module, (torch.randn(4, 3),), {})], PlantedClock())
    assert len(seconds) == REPEATS
    assert module.modes == [(False, True)] * (WARMUP + REPEATS)
    assert module.table is None and module.training and not module.linear.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not torch.equal(random, torch.get_rng_state())  # of this test's own randn
    module(torch.randn(4, 3)).sum().backward()


def test_inputs_are_held_without_the_graph_that_led_to_them() -> None:
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True) * 2
    call = Call.of(module, (x,), {"again": [x]})
    assert not call.args[0].requires_grad and not call.kwargs["again"][0].requires_grad


def test_autocast_of_training_is_that_of_inference_too() -> None:
    module, seen = nn.Linear(2, 2), []
    module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = Call.of(module, (torch.ones(1, 2),), {})
    call.run()
    assert seen == [torch.bfloat16]


def test_layers_that_compute_otherwise_in_training_are_named() -> None:
    modules = [nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(2)), nn.Dropout(0.0)]
    assert unlike_in_training(modules) == ["BatchNorm1d", "Dropout"]
    assert unlike_in_training([nn.Dropout(0.0), nn.Linear(2, 2)]) == []
