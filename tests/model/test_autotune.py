"""A plain backward gives the fused one's gradients, and is taken where it was measured to be the quicker."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isoforward.formats.export import freeze
from isoforward.measure.case import Case, with_kernels
from isoforward.model import autotune
from isoforward.model.attention_kernels import attend_plainly
from isoforward.model.autotune import backward_of, choose_backward
from isoforward.model.gpt import GPT
from tests.conftest import lively, tiny

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[float, float], None]]:
    """Plants what fused and plain take, and a cache of its own."""

    def plant(fused_s: float, plain_s: float) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(autotune, "times_s", lambda shape: (fused_s, plain_s))
        autotune.measured_once.cache_clear()

    yield plant
    autotune.measured_once.cache_clear()


@pytest.mark.parametrize(("plain_s", "chosen"), [(0.5, "plain"), (0.95, "fused"), (2.0, "fused")])
def test_the_quicker_one_is_taken_and_kept(
    plain_s: float, chosen: str, timed: Callable[[float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(1.0, plain_s)
    model = lively(GPT(tiny(), dtype=torch.bfloat16))
    choose_backward(model, CPU, batch=2, length=16)
    plain = [block.get_submodule("attention").attend is attend_plainly for block in model.blocks]
    assert plain == [chosen == "plain"] * 2
    autotune.measured_once.cache_clear()  # another process, which may not measure again
    monkeypatch.setattr(autotune, "times_s", lambda shape: pytest.fail("measured twice"))
    assert backward_of(model.config, torch.bfloat16, CPU, batch=2, length=16) == chosen


def test_nothing_is_measured_where_the_fused_one_is_known_to_be_better_or_the_only_one(
    timed: Callable[[float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(1.0, 0.1)
    monkeypatch.setattr(autotune, "times_s", lambda shape: pytest.fail("measured"))
    for config, dtype, device in (
        (tiny(), torch.float32, CPU),
        (tiny(), torch.bfloat16, torch.device("cuda")),
        (tiny(dropout=0.1), torch.bfloat16, CPU),
        (tiny(family="llama", kv_heads=2), torch.bfloat16, CPU),
    ):
        assert backward_of(config, dtype, device, batch=2, length=16) == "fused"


def test_both_lives_keep_the_same_bits_and_the_rows_say_which_backward_it_was(
    timed: Callable[[float, float], None], tokens: torch.Tensor
) -> None:
    timed(1.0, 0.5)
    model = lively(GPT(tiny(), dtype=torch.bfloat16))
    choose_backward(model, CPU, batch=3, length=20)
    logits = model(tokens)
    with torch.inference_mode():
        assert torch.equal(freeze(model)(tokens), logits)
    assert logits.grad_fn is not None
    case = Case(experiment="planted", model=tiny(), precision="bf16", batch=3, length=20)
    assert "attention_backward" not in case.training()  # making a label measures nothing
    assert with_kernels(case).training()["attention_backward"] == "plain"
    assert "attention_backward" not in with_kernels(replace(case, precision="fp32")).training()


def test_a_real_measurement_has_two_times() -> None:
    assert all(time_s > 0 for time_s in autotune.times_s((1, 2, 8, 4)))
