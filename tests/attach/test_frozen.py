"""The other life: the same forwards in eval mode, and modules that are afterwards what they were."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isoforward.attach.frozen import REPEATS, WARMUP, Call, frozen, time_frozen, time_serving
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


def test_a_running_mean_that_is_written_in_place_is_what_it_was() -> None:
    norm = nn.BatchNorm1d(3)
    with frozen([Call.of(norm, (torch.randn(4, 3),), {})]):
        norm.train()(torch.randn(4, 3))
        assert norm.running_mean is not None and norm.running_mean.any()
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0


def test_a_causal_model_is_served_token_by_token_and_no_other() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 8}
    model, asked = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), []
    call = Call.of(model, (), {"input_ids": torch.arange(16).view(2, 8), "labels": None})
    model.register_forward_pre_hook(lambda module, args, kwargs: asked.append(args[0].shape), with_kwargs=True)
    seconds = time_serving(call, PlantedClock())
    assert {phase: len(samples) for phase, samples in seconds.items()} == {"prefill": REPEATS, "decode": REPEATS}
    assert asked.count((1, 1)) == WARMUP + REPEATS and asked.count((1, 7)) == WARMUP + REPEATS + 1  # and the cache's
    assert model.training
    assert not time_serving(Call.of(nn.Linear(2, 2), (torch.ones(1, 2),), {}), PlantedClock())
