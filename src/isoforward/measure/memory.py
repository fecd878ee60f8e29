"""The ledger beside the peak that a process of its own measured.

No dispatch mode sees what kernels take for themselves, so that it is measured too, never had by subtraction:

    kernel workspace   beside its results, by the operator that ran at the peak (oneDNN's fp32 results under bf16)
    kernel buffers     kept when every tensor is gone (MKL's, for packed matrices)
    unexplained        the measured peak less all of this
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.base.memory_readers import CudaMemory, Memory, ProcessMemory
from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.formats.export import freeze
from isoforward.measure.memory_ledger import Ledger, generate, inference_ledger, training_ledger
from isoforward.model import steps
from isoforward.model.autotune import choose_backward
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.optim import build
from isoforward.serve.inference import DTYPES

TINY = 16
HONEST_MALLOC = {  # blocks of 64 KiB and more are mapped one by one, and unmapped when freed
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}

Life = tuple[Callable[[steps.Phase], object], Callable[[Memory], Ledger]]  # runs under a phase; gives its ledger


class PeakOf:
    """Pass it as `phase`: each phase's peak above `baseline`."""

    def __init__(self, memory: Memory, baseline: int) -> None:
        self.memory, self.baseline = memory, baseline
        self.phases: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.memory.reset()
        yield
        self.phases[phase] = max(self.phases.get(phase, 0), self.memory.peak() - self.baseline)


@dataclass(frozen=True, kw_only=True)
class Account:
    """A ledger beside the peaks that the process itself saw, above what it held before there was a model."""

    ledger: Ledger
    kernels_bytes: int  # what libraries still hold when every tensor is gone, such as MKL's packing buffers
    measured: dict[str, int]  # by phase
    threads: int

    @property
    def measured_bytes(self) -> int:
        return max(self.measured.values())

    @property
    def unexplained_bytes(self) -> int:
        return self.measured_bytes - self.kernels_bytes - self.ledger.peak_bytes

    @property
    def rows(self) -> dict[str, int]:
        """Categories that add up to `measured_bytes`."""
        return {**self.ledger.categories, "kernel buffers": self.kernels_bytes, "unexplained": self.unexplained_bytes}


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    model: ModelConfig
    batch: int
    length: int
    optim: OptimConfig = field(default_factory=OptimConfig)
    accumulate: int = 1
    checkpointing: str = "none"
    dtype: str = "fp32"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class InferenceCase:
    model: ModelConfig
    batch: int
    prompt: int
    new_tokens: int
    cache: bool = True
    dtype: str = "fp32"
    device: str = "cpu"


def account(
    case: TrainingCase | InferenceCase, *, threads: int | None = None, timeout_s: float | None = None
) -> Account | Failed:
    """In a process of its own, where malloc gives back what is freed: else the peak would be that of the past."""
    audit = "audit_training" if isinstance(case, TrainingCase) else "audit_inference"
    target = f"isoforward.measure.memory:{audit}"
    found = run_isolated(target, asdict(case), threads=threads, env=HONEST_MALLOC, timeout_s=timeout_s)
    return found if isinstance(found, Failed) else Account(**{**found, "ledger": Ledger(**found["ledger"])})


def audit_training(case: dict[str, Any]) -> dict[str, Any]:
    def live(model: ModelConfig, batch: int, length: int) -> Life:
        gpt = GPT(model, dtype=DTYPES[case["dtype"]], checkpointing=case["checkpointing"]).to(case["device"])
        choose_backward(gpt, torch.device(case["device"]), batch=batch // case["accumulate"], length=length)
        settings = OptimConfig(**case["optim"])
        optimizer = build(gpt, settings)
        tokens = torch.randint(model.vocabulary, (batch, length), device=case["device"])
        step = partial(steps.train_step, accumulate=case["accumulate"], clip=settings.clip)
        return (
            lambda phase: step(gpt, optimizer, tokens, tokens, phase=phase),
            lambda memory: training_ledger(gpt, optimizer, tokens, tokens, step=step, memory=memory),
        )

    model = ModelConfig(**case["model"])
    tiny = partial(live, tiny_like(model), case["accumulate"], TINY)
    return audit(tiny, partial(live, model, case["batch"], case["length"]), case["device"])


def audit_inference(case: dict[str, Any]) -> dict[str, Any]:
    def live(model: ModelConfig, batch: int, prompt: int, new_tokens: int) -> Life:
        gpt = freeze(GPT(model, dtype=DTYPES[case["dtype"]]).to(case["device"]))
        tokens = torch.randint(model.vocabulary, (batch, prompt), device=case["device"])

        def cache() -> KVCache | None:
            if not case["cache"] or not new_tokens:
                return None
            capacity = prompt + new_tokens - 1
            cache = KVCache(model, batch=batch, capacity=capacity, dtype=gpt.dtype, device=case["device"])
            cache.fill(0)  # what is allocated but not touched is not in the process' memory
            return cache

        return (
            lambda phase: generate(gpt, tokens, cache(), new_tokens=new_tokens, phase=phase),
            lambda memory: inference_ledger(gpt, tokens, cache(), new_tokens=new_tokens, memory=memory),
        )

    model = ModelConfig(**case["model"])
    tiny = partial(live, tiny_like(model), 1, TINY // 2, TINY // 2)
    return audit(tiny, partial(live, model, case["batch"], case["prompt"], case["new_tokens"]), case["device"])


def tiny_like(model: ModelConfig) -> ModelConfig:
    return replace(model, layers=1, heads=2, kv_heads=1, width=TINY, ffn=None, context=TINY, vocab=TINY)


def audit(tiny: Callable[[], Life], whole: Callable[[], Life], device: str) -> dict[str, Any]:
    """Tiny first, which loads libraries; then whole and dropped, for what kernels keep; then whole, for the peaks."""
    memory = CudaMemory() if device == "cuda" else ProcessMemory()
    rehearse(tiny)
    before = memory.now()
    rehearse(whole)
    kernels = memory.now() - before
    run, ledger = whole()
    run(steps.unmeasured)  # Adam's state appears
    peaks = PeakOf(memory, before)
    run(peaks)
    return {
        "ledger": asdict(ledger(memory)),
        "kernels_bytes": kernels,
        "measured": peaks.phases,
        "threads": torch.get_num_threads(),
    }


def rehearse(live: Callable[[], Life]) -> None:
    run, _ = live()
    run(steps.unmeasured)
    del run, _
    gc.collect()
