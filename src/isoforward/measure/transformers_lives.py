"""Both lives of a model of Transformers, through the same steps, clocks and rounds as those of our own GPT.

What rests on knowing the architecture is unavailable, and says so: the ledger by kind of layer, the least traffic,
FLOPs of the causal half alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from isoforward.base.config import OptimConfig
from isoforward.base.errors import BadInput
from isoforward.base.memory_readers import CudaMemory, ProcessMemory
from isoforward.base.results import CONVENTIONS, TRAINING, Condition, Row, write
from isoforward.base.subprocesses import run_isolated
from isoforward.measure.case import Case, Laps, apart, batch_of, done, identity_row, record, row
from isoforward.measure.flops import FlopCounter, Scope, by_phase, fused_attention
from isoforward.measure.memory import HONEST_MALLOC, PeakOf
from isoforward.measure.memory_ledger import generate
from isoforward.measure.train_and_serve import (
    at_context,
    contexts,
    decoding,
    energy_rows,
    prefilling,
    serving_candidates,
    time_rows,
    training_candidates,
)
from isoforward.model import steps
from isoforward.model.optim import FUSED
from isoforward.serve.inference import DTYPES
from isoforward.serve.transformers_model import Wrapped, WrappedCache, frozen_copy, load_wrapped, skeleton

AUDITS = ("audit_training", "audit_generation", "audit_forward")
NO_LEDGER = "the ledger names the layers of our own forward; those of another architecture it does not know"
NO_TRAFFIC = "the least traffic follows from a formula for GPT-2 and Llama; of other architectures we have none"
NO_TRIANGLE = "a mask that the architecture makes for itself does not say which pairs it leaves out"


def measure_wrapped_lives(case: Case, results: Path, command: str) -> None:
    """Appends the rows of every pass to `results`; each pass in a process of its own."""
    environment_id = apart(case, "isoforward.measure.transformers_lives:time", results, command)
    rows = [row for audit in AUDITS for row in memory_rows(case, audit)]
    write(results, [replace(row, environment=environment_id) for row in rows])


def time(packed: dict[str, Any]) -> str:
    case = Case.unpack(packed["case"])
    master = master_of(case)
    frozen = frozen_copy(master)
    tokens, targets = batch_of(case)
    identity = identity_row(case, master, frozen, tokens[:1])
    training = training_candidates(case, master, tokens, targets, optimizer=optimizer_of(master, case.optim))
    serving = serving_candidates(case, frozen, tokens, cache=WrappedCache(frozen))
    candidates = {**training, **serving}

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        yield identity
        yield from time_rows(case, laps, cold)
        yield from flop_rows(case)
        yield from unavailable_rows(case)
        yield from energy_rows(case, candidates)

    return record(packed, candidates, tell)


def master_of(case: Case) -> Wrapped:
    return load_wrapped(Path(str(case.model.path)), dtype=DTYPES[case.precision], device=case.device)


def optimizer_of(model: Wrapped, config: OptimConfig) -> Optimizer:
    """The same kinds as for our own model; every matrix decays, since embeddings go by no one name."""
    kinds: dict[str, type[Adam]] = {"adam": Adam, "adamw": AdamW}
    if config.name == "muon":
        raise BadInput("optim=muon has to know which matrices are a block's; with model=transformers write optim=adamw")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = model.model.device.type in FUSED
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
    return kinds[config.name](groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


def flop_rows(case: Case) -> Iterator[Row]:
    """Counted by dispatch on the meta device; an architecture that asks its data what to do next is not counted."""
    for convention in CONVENTIONS:
        reason = NO_TRIANGLE
        counts: list[int] | None = None
        if convention != "causal":
            try:
                counts = count(case, convention)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                reason = f"not countable without data: {str(error).partition(chr(10))[0]}"
        for n, place in enumerate(places(case)):
            about = {**place, "quantity": "flops", "unit": "flop", "convention": convention}
            if counts is None:
                yield unavailable(case, reason, **about)
            else:
                yield row(case, **about, value=float(counts[n]), provenance="counted")


def places(case: Case) -> list[dict[str, Any]]:
    """Where FLOPs belong, in the order in which `count` gives them."""

    def place(life: str, phase: str, per: str, conditions: dict[str, Condition]) -> dict[str, Any]:
        return {"life": life, "phase": phase, "per": per, "conditions": conditions}

    return [
        *(place("training", phase, "step", case.training()) for phase in TRAINING),
        place("inference", "forward", "step", case.training()),
        place("inference", "prefill", "sequence", prefilling(case)),
        place("inference", "decode", "token", decoding(case)),
        *(place("inference", "decode", "token", at_context(case, n, cache=True)) for n in contexts(case)),
        *(place("inference", "decode", "token", at_context(case, n, cache=False)) for n in contexts(case)),
    ]


def count(case: Case, convention: str) -> list[int]:
    model: Any = skeleton(Path(str(case.model.path)))
    cache: Any = WrappedCache(model)
    with torch.device("meta"):
        batch = torch.zeros(case.batch, case.length, dtype=torch.long)
        text = torch.zeros(1, case.model.context, dtype=torch.long)

    def counted(work: Callable[[Scope], object]) -> dict[str, int]:
        scope = Scope({})
        counter = FlopCounter(scope, convention=convention)
        with fused_attention(), counter:
            work(scope)
        return by_phase(counter.flops)

    def decoded(cached: int) -> int:
        cache.length = cached
        return counted(lambda phase: steps.decode(model, text[:, :1], cache, phase=phase))["decode"]

    def decoded_uncached(length: int) -> int:
        return counted(lambda phase: steps.decode_uncached(model, text[:, :length], phase=phase))["decode"]

    optimizer = optimizer_of(model, case.optim)
    trained = counted(
        lambda phase: steps.train_step(model, optimizer, batch, batch, accumulate=case.accumulate, phase=phase)
    )
    prefilled = counted(lambda phase: steps.prefill(model, text[:, : case.prompt], cache, phase=phase))["prefill"]
    return [
        *(trained.get(phase, 0) for phase in TRAINING),
        trained["forward"],
        prefilled,
        decoded(case.prompt + case.new_tokens // 2),
        *(decoded(context - 1) for context in contexts(case)),
        *(decoded_uncached(context) for context in contexts(case)),
    ]


def unavailable(case: Case, reason: str, **about: Any) -> Row:
    return row(case, **about, value=None, provenance="unavailable", reason=reason)


def unavailable_rows(case: Case) -> Iterator[Row]:
    about: dict[str, Any] = {"life": "inference", "quantity": "bytes", "unit": "byte"}
    yield unavailable(case, NO_TRAFFIC, **about, phase="prefill", per="sequence", conditions=prefilling(case))
    yield unavailable(case, NO_TRAFFIC, **about, phase="decode", per="token", conditions=decoding(case))
    about = {"quantity": "memory", "unit": "byte", "phase": "step", "per": "step"}
    yield unavailable(case, NO_LEDGER, **about, life="training", conditions=case.training(category="ledger"))


def memory_rows(case: Case, audit: str) -> Iterator[Row]:
    """The peak of each phase, in a process of its own, where malloc gives back what is freed."""
    target = f"isoforward.measure.transformers_lives:{audit}"
    peaks = done(run_isolated(target, case.pack(), threads=case.threads, env=HONEST_MALLOC), "memory")
    life = "training" if audit == "audit_training" else "inference"
    conditions = decoding(case) if audit == "audit_generation" else case.training()
    about: dict[str, Any] = {"life": life, "quantity": "memory", "unit": "byte", "conditions": conditions}
    for phase, peak in peaks.items():
        yield row(case, **about, phase=phase, per="step" if life == "training" else "sequence", value=float(peak))


def audit_training(packed: dict[str, Any]) -> dict[str, int]:
    def live(case: Case) -> Callable[[steps.Phase], object]:
        model = master_of(case)
        optimizer = optimizer_of(model, case.optim)
        batch, clip = batch_of(case), case.optim.clip
        return lambda phase: steps.train_step(
            model, optimizer, *batch, accumulate=case.accumulate, clip=clip, phase=phase
        )

    return audit(Case.unpack(packed), live)


def audit_forward(packed: dict[str, Any]) -> dict[str, int]:
    return audit(Case.unpack(packed), partial(serving, new_tokens=0))


def audit_generation(packed: dict[str, Any]) -> dict[str, int]:
    case = replace(Case.unpack(packed), batch=1)
    return audit(replace(case, length=case.prompt), partial(serving, new_tokens=case.new_tokens))


def serving(case: Case, new_tokens: int) -> Callable[[steps.Phase], object]:
    model: Any = master_of(case).eval().requires_grad_(False)
    tokens, _ = batch_of(case)
    cache: Any = WrappedCache(model) if new_tokens else None

    def run(phase: steps.Phase) -> None:
        if cache is not None:
            cache.length = 0
        generate(model, tokens, cache, new_tokens=new_tokens, phase=phase)

    return run


def audit(case: Case, live: Callable[[Case], Callable[[steps.Phase], object]]) -> dict[str, int]:
    """Above what the process holds when one such model has run and is gone, libraries and kernel buffers among it."""
    memory = CudaMemory() if case.device == "cuda" else ProcessMemory()
    live(case)(steps.unmeasured)
    gc.collect()
    peaks = PeakOf(memory, memory.now())
    run = live(case)
    run(steps.unmeasured)  # Adam's state appears
    run(peaks)
    return peaks.phases
