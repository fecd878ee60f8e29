from __future__ import annotations

from typing import Any

import pytest
import torch

from isoforward.base.config import AdapterConfig, MeasureConfig, ModelConfig
from isoforward.base.memory_readers import ProcessMemory
from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.measure.case import Case
from isoforward.measure.memory import HONEST_MALLOC, Account, PeakOf, account, tiny_like
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT


def hold_for_a_phase(size: int) -> dict[str, int]:
    memory = ProcessMemory()
    torch.ones(1)  # builds for GPUs load what they need at the first call
    peaks = PeakOf(memory, memory.now())
    with peaks("before"):
        pass
    with peaks("planted"):
        torch.ones(size, dtype=torch.uint8)
    with peaks("after"):
        pass
    return peaks.phases


def test_the_process_sees_planted_memory_in_its_phase_alone() -> None:
    size = 256 * 2**20
    peaks = run_isolated(hold_for_a_phase, size, env=HONEST_MALLOC)
    assert not isinstance(peaks, Failed)
    assert peaks["planted"] == pytest.approx(size, rel=0.02)
    assert max(abs(peaks["before"]), abs(peaks["after"])) < 0.02 * size


def explained(life: str, model: ModelConfig, *, cache: bool = True, **about: Any) -> Account:
    measure = MeasureConfig(prompt=192, new_tokens=4)
    found = account(Case(experiment="memory", model=model, measure=measure, threads=1, **about), life, cache=cache)
    assert isinstance(found, Account), found
    assert sum(found.rows.values()) == found.measured_bytes
    assert abs(found.unexplained_bytes) <= 0.05 * found.measured_bytes, found.rows
    return found


MEDIUM = ModelConfig(layers=2, heads=4, width=256, context=256, vocab=1024)
SMALL = ModelConfig(layers=6, heads=6, width=384, context=256, vocab=1024)
GPT2 = ModelConfig(layers=12, heads=12, width=768, context=1024, vocab=50257)


def test_at_most_a_twentieth_of_a_training_peak_is_unexplained() -> None:
    found = explained("training", MEDIUM, batch=8, length=256)
    assert found.threads == 1
    assert set(found.measured) == {"forward", "loss", "backward", "optimizer"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_at_most_a_twentieth_of_the_small_models_training_is_unexplained(checkpointing: str) -> None:
    explained("training", SMALL, batch=16, length=256, checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, GPT2], ids=["small", "gpt2"])
@pytest.mark.parametrize(("cache", "dtype"), [(True, "fp32"), (False, "fp32"), (True, "bf16")])
def test_at_most_a_twentieth_of_serving_is_unexplained(model: ModelConfig, cache: bool, dtype: str) -> None:
    explained("generation", model, cache=cache, precision=dtype)


@pytest.mark.slow
def test_at_most_a_twentieth_of_gpt2s_training_is_unexplained() -> None:
    explained("training", GPT2, batch=2, length=256)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [SMALL, GPT2], ids=["small", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_at_most_a_twentieth_of_a_peak_is_unexplained_on_a_gpu(model: ModelConfig, dtype: str) -> None:
    explained("training", model, batch=16, length=256, precision=dtype, device="cuda")
    explained("generation", model, precision=dtype, device="cuda")


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 24}, {"name": "frozen", "targets": ["blocks.1"]}])
def test_the_rehearsal_has_an_adapter_that_fits_it(adapter: dict[str, Any]) -> None:
    """Of one layer and a few features, whatever the case's own rank and targets are."""
    model = ModelConfig(layers=2, heads=4, width=32, context=32, vocab=61)
    small = tiny_like(Case(experiment="memory", model=model, adapter=AdapterConfig(**adapter)))
    assert adapt(GPT(small.model), small.adapter).adapter.name == adapter["name"]
