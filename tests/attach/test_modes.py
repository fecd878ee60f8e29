"""Outputs of training mode against those of inference, and the layers that make the difference."""

import pytest
import torch
from torch import Tensor, nn

from isoforward.attach.frozen import Call
from isoforward.attach.modes import ALL, OTHERS, distances, unlike_in_training


def called(module: nn.Module) -> Call:
    torch.manual_seed(0)
    return Call.of(module, (torch.randn(16, 4),), {})


def test_layers_that_compute_otherwise_in_training_are_named() -> None:
    modules = [nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(2)), nn.Dropout(0.0)]
    assert unlike_in_training(modules) == ["BatchNorm1d", "Dropout"]
    assert unlike_in_training([nn.Dropout(0.0), nn.Linear(2, 2)]) == []


def test_a_module_that_is_the_same_in_both_modes_has_no_distance() -> None:
    assert distances([called(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))]) == {ALL: 0.0, OTHERS: 0.0}


def test_dropouts_share_is_that_of_its_scale() -> None:
    """With p = 1/2 a kept output is doubled and another is 0: both are as far as the output itself."""
    found = distances([called(nn.Linear(4, 4)), called(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))])
    assert found["Dropout"] == found[ALL] == pytest.approx(1.0)
    assert found[OTHERS] == 0.0


def test_batch_norm_is_told_from_dropout_and_keeps_its_statistics() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    call = called(module)
    torch.set_rng_state(random)
    found = distances([call])
    assert min(found[kind] for kind in (ALL, "BatchNorm1d", "Dropout")) > 0.0 == found[OTHERS]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(part.training for part in module.modules())


def test_a_forward_that_asks_for_the_mode_is_told_from_layers() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (2.0 if self.training else 1.0)  # type: ignore[no-any-return]

    assert distances([called(Asks())]) == {ALL: pytest.approx(1.0), OTHERS: pytest.approx(1.0)}
