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

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from isoforward.base.config import OptimConfig
from isoforward.base.device import device_of
from isoforward.base.errors import BadInput
from isoforward.base.results import Row, RowFields, unavailable
from isoforward.base.vocabulary import CONVENTIONS, TRAINING
from isoforward.measure.benchmark import Part
from isoforward.measure.case import Case, batch_of, counted, identity_row
from isoforward.measure.flops import FlopCounter, Scope, by_phase, fused_attention
from isoforward.measure.memory import HONEST_MALLOC, PeakOf, held_in
from isoforward.measure.memory_ledger import generate
from isoforward.measure.passes import Bench, call_apart
from isoforward.measure.train_and_serve import Serving, Training, bench_of
from isoforward.model import steps
from isoforward.model.optim import FUSED
from isoforward.serve.inference import DTYPES
from isoforward.serve.transformers_model import Wrapped, WrappedCache, frozen_copy, load_wrapped, skeleton

NO_LEDGER = "the ledger names the layers of our own forward; those of another architecture it does not know"
NO_TRAFFIC = "the least traffic follows from a formula for GPT-2 and Llama; of other architectures we have none"
NO_TRIANGLE = "a mask that the architecture makes for itself does not say which pairs it leaves out"


def bench(case: Case) -> Bench:
    master = master_of(case)
    frozen = frozen_copy(master)
    tokens, targets = batch_of(case)
    identity = identity_row(case, master, frozen, tokens[:1])
    training = Training(case, master, tokens, targets, optimizer=optimizer_of(master, case.optim))
    serving = Serving(case, frozen, tokens, cache=WrappedCache(frozen))
    return bench_of(case, identity, training, serving, lambda: [*flop_rows(case), *unavailable_rows(case)])


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
        about: RowFields = {"quantity": "flops", "convention": convention}
        reason, counts = NO_TRIANGLE, list[int]()
        if convention != "causal":
            try:
                counts = count(case, convention)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                reason = f"not countable without data: {str(error).partition(chr(10))[0]}"
        for n, part in enumerate(places(case)):
            yield case.row(part.about, about, counted(counts[n], convention) if counts else unavailable(reason))


def places(case: Case) -> list[Part]:
    """Where FLOPs belong, in the order in which `count` gives them."""
    return [
        *map(case.step, TRAINING),
        *map(case.serve, ("forward", "prefill", "decode")),
        *(case.after(context, cache=cache) for cache in (True, False) for context in case.contexts),
    ]


def count(case: Case, convention: str) -> list[int]:
    model = skeleton(Path(str(case.model.path)))
    cache = WrappedCache(model)
    with torch.device("meta"):
        batch = torch.zeros(case.batch, case.length, dtype=torch.long)
        text = torch.zeros(1, max(case.contexts[-1], case.prompt), dtype=torch.long)

    def dispatched(work: Callable[[Scope], object]) -> dict[str, int]:
        scope = Scope({})
        counter = FlopCounter(scope, convention=convention)
        with fused_attention(), counter:
            work(scope)
        return by_phase(counter.flops)

    def decoded(cached: int) -> int:
        cache.rewind(cached)
        return dispatched(lambda phase: steps.decode(model, text[:, :1], cache, phase=phase))["decode"]

    def decoded_uncached(length: int) -> int:
        return dispatched(lambda phase: steps.decode_uncached(model, text[:, :length], phase=phase))["decode"]

    optimizer = optimizer_of(model, case.optim)
    trained = dispatched(
        lambda phase: steps.train_step(model, optimizer, batch, batch, accumulate=case.accumulate, phase=phase)
    )
    prefilled = dispatched(lambda phase: steps.prefill(model, text[:, : case.prompt], cache, phase=phase))["prefill"]
    return [
        *(trained.get(phase, 0) for phase in TRAINING),
        trained["forward"],
        prefilled,
        decoded(case.prompt + case.new_tokens // 2),
        *(decoded(context - 1) for context in case.contexts),
        *(decoded_uncached(context) for context in case.contexts),
    ]


def unavailable_rows(case: Case) -> Iterator[Row]:
    for phase in ("prefill", "decode"):
        yield case.row(case.serve(phase).about, unavailable(NO_TRAFFIC), quantity="bytes")
    yield case.row(case.step("step", category="ledger").about, unavailable(NO_LEDGER), quantity="memory")


def memory_rows(case: Case, life: str) -> Iterator[Row]:
    """The peak of each phase, in a process of its own, where malloc gives back what is freed."""
    peaks = call_apart(audit, case, life, threads=case.threads, env=HONEST_MALLOC, what="memory")
    for phase, peak in peaks.items():
        yield case.row(held_in(case, life), phase=phase, value=float(peak))


def audit(case: Case, life: str) -> dict[str, int]:
    """Above what the process holds when one such model has run and is gone, libraries and kernel buffers among it."""
    live = training if life == "training" else partial(serving, alone=life == "generation")
    memory = device_of(case.device).memory
    live(case)(steps.unmeasured)
    gc.collect()
    peaks = PeakOf(memory, memory.now())
    run = live(case)
    run(steps.unmeasured)  # Adam's state appears
    run(peaks)
    return peaks.phases


Run = Callable[[steps.Phase], object]


def training(case: Case) -> Run:
    model = master_of(case)
    optimizer, batch = optimizer_of(model, case.optim), batch_of(case)
    step = partial(steps.train_step, model, optimizer, *batch, accumulate=case.accumulate, clip=case.optim.clip)
    return lambda phase: step(phase=phase)


def serving(case: Case, *, alone: bool) -> Run:
    """A generation from one prompt `alone`, or training's batch in one forward."""
    case, new_tokens = (replace(case, batch=1, length=case.prompt), case.new_tokens) if alone else (case, 0)
    model = master_of(case).eval().requires_grad_(False)
    tokens, _ = batch_of(case)
    cache = WrappedCache(model) if new_tokens else None

    def run(phase: steps.Phase) -> None:
        if cache is not None:
            cache.rewind(0)
        generate(model, tokens, cache, new_tokens=new_tokens, phase=phase)

    return run
