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
from dataclasses import dataclass, replace
from functools import partial

import torch

from isoforward.base.device import device_of
from isoforward.base.memory_readers import Memory, why_unreadable
from isoforward.base.results import Row, RowFields, unavailable
from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.base.vocabulary import Condition
from isoforward.formats.export import freeze
from isoforward.measure.case import Case
from isoforward.measure.memory_ledger import Ledger, generate, inference_ledger, training_ledger
from isoforward.measure.passes import measured_or_refused
from isoforward.model import steps
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.kernels import use_backward
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


WHOLE = {"training": "step", "generation": "run", "forward": "forward"}  # the phase of what each life runs
LIVES = tuple(WHOLE)  # a step; one prompt and what follows it; training's batch, frozen


def account(case: Case, life: str, *, cache: bool = True) -> Account | Failed:
    """In a process of its own, where malloc gives back what is freed: else the peak would be that of the past.

    `life` is one of LIVES. Of a compiled case the ledger is empty: no dispatch mode sees into compiled code.
    """
    served = partial(serving_life, alone=life == "generation", cache=cache)
    return account_of(case, training_life if life == "training" else served)


def account_of(case: Case, live: Callable[[Case], Life]) -> Account | Failed:
    """Of whatever `live` makes of a case."""
    return run_isolated(audit, case, live, threads=case.threads, env=HONEST_MALLOC)


def audit(case: Case, live: Callable[[Case], Life]) -> Account:
    """Tiny first, which loads libraries; then whole and dropped, for what kernels keep; then whole, for the peaks."""
    memory = device_of(case.device).memory
    rehearse(partial(live, tiny_like(case)))
    before = memory.now()
    rehearse(partial(live, case))
    kernels = memory.now() - before
    run, ledger = live(case)
    run(steps.unmeasured)  # Adam's state appears
    peaks = PeakOf(memory, before)
    run(peaks)
    return Account(
        ledger=Ledger(phases={}, retained={}) if case.compile else ledger(memory),
        kernels_bytes=kernels,
        measured=peaks.phases,
        threads=torch.get_num_threads(),
    )


def training_life(case: Case) -> Life:
    gpt = GPT(case.model, dtype=DTYPES[case.precision], checkpointing=case.checkpointing).to(case.device)
    adapt(gpt, case.adapter)
    use_backward(gpt, case.attention_backward)
    if case.compile:
        gpt.compile_blocks()
    optimizer = build(gpt, case.optim)
    tokens = torch.randint(case.model.vocabulary, (case.batch, case.length), device=case.device)
    step = partial(steps.train_step, accumulate=case.accumulate, clip=case.optim.clip)
    return (
        lambda phase: step(gpt, optimizer, tokens, tokens, phase=phase),
        lambda memory: training_ledger(gpt, optimizer, tokens, tokens, step=step, memory=memory),
    )


def serving_life(case: Case, *, alone: bool, cache: bool) -> Life:
    """A generation from one prompt `alone`, or training's batch in one forward."""
    gpt = freeze(GPT(case.model, dtype=DTYPES[case.precision]).to(case.device))
    batch, length = (1, case.prompt) if alone else (case.batch, case.length)
    new_tokens = case.new_tokens if alone else 0
    tokens = torch.randint(case.model.vocabulary, (batch, length), device=case.device)
    if case.compile and not alone:
        gpt.compile()

    def room() -> KVCache | None:
        if not cache or not new_tokens:
            return None
        room = KVCache(case.model, batch=batch, capacity=length + new_tokens - 1, dtype=gpt.dtype, device=case.device)
        room.fill(0)  # what is allocated but not touched is not in the process' memory
        return room

    return (
        lambda phase: generate(gpt, tokens, room(), new_tokens=new_tokens, phase=phase),
        lambda memory: inference_ledger(gpt, tokens, room(), new_tokens=new_tokens, memory=memory),
    )


def tiny_like(case: Case) -> Case:
    model = replace(case.model, layers=1, heads=2, kv_heads=1, width=TINY, ffn=None, context=TINY, vocab=TINY)
    measure = replace(case.measure, prompt=TINY // 2, new_tokens=TINY // 2)
    lora = case.adapter.name == "lora"
    adapter = replace(case.adapter, rank=1, targets=case.adapter.targets if lora else [])  # what one layer has
    return replace(case, model=model, batch=case.accumulate, length=TINY, measure=measure, adapter=adapter)


def rehearse(live: Callable[[], Life]) -> None:
    run, _ = live()
    run(steps.unmeasured)
    del run, _
    gc.collect()


def held_in(case: Case, life: str, **more: Condition) -> RowFields:
    """What all rows of the memory of one of LIVES share."""
    conditions = (case.decoding if life == "generation" else case.training)(**more)
    own: RowFields = {"life": "inference", "per": "sequence"} if life != "training" else {"life": life, "per": "step"}
    return {**own, "quantity": "memory", "conditions": conditions}


def memory_rows(case: Case, life: str, found: Account, **more: Condition) -> Iterator[Row]:
    """The measured peak of each phase, and of the whole by category, what is unexplained among them."""
    about = held_in(case, life, **more)
    for phase, peak in found.measured.items():
        yield case.row(about, phase=phase, value=float(peak))
    if life == "forward" or not found.ledger.phases:
        return  # a single phase needs no account of the whole
    for category, size in {**found.rows, "measured peak": found.measured_bytes}.items():
        seen = category in ("unexplained", "kernel buffers", "kernel workspace", "measured peak")
        at = {**about["conditions"], "category": category, "peak_phase": found.ledger.peak_phase}
        how = "measured" if seen else "counted"
        yield case.row(about, phase=WHOLE[life], value=float(size), provenance=how, conditions=at)


def account_rows(case: Case, life: str) -> list[Row]:
    """Measured now, or a row that says why the system does not tell. BadInput where the process failed."""
    if why := why_unreadable(case.device):
        return [case.row(held_in(case, life), unavailable(why), phase=WHOLE[life])]
    found = measured_or_refused(account(case, life), f"the memory of {life}")
    return list(memory_rows(case, life, found))
