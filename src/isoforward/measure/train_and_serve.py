"""Both lives of one model: time, FLOPs, bytes, memory and energy of every phase, as rows."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isoforward.base.datasheets import known_here, lookup
from isoforward.base.memory_readers import why_unreadable
from isoforward.base.results import TRAINING, Condition, Row, write
from isoforward.base.stopwatch import Stopwatch, clock_for
from isoforward.formats.export import freeze
from isoforward.measure import flops
from isoforward.measure.case import (
    Candidates,
    Case,
    Laps,
    apart,
    batch_of,
    done,
    identity_row,
    master_of,
    record,
    row,
    spent,
    timed,
)
from isoforward.measure.energy import open_reader
from isoforward.measure.memory import Account, InferenceCase, TrainingCase, account
from isoforward.model import footprint, steps
from isoforward.model.gpt import KVCache
from isoforward.model.optim import build
from isoforward.serve.compiled import StaticKVCache, compiled_decode

BURST = 8  # decode steps in one sample of the cache curve: one alone is shorter than the clock's trust


def measure_both_lives(case: Case, results: Path, command: str) -> None:
    """Appends the rows of every pass to `results`; each pass in a process of its own."""
    environment_id = apart(case, "isoforward.measure.train_and_serve:time", results, command)
    generation = generation_of(case)
    forward = dataclasses.replace(generation, batch=case.batch, prompt=case.length, new_tokens=0)
    for what, life, conditions in (
        (step_of(case), "training", case.training()),
        (generation, "inference", decoding(case)),
        (forward, "inference", case.training()),
    ):
        rows = memory_rows(case, what, life, conditions)
        write(results, [dataclasses.replace(row, environment=environment_id) for row in rows])


def step_of(case: Case) -> TrainingCase:
    """For its memory account, as is `generation_of`."""
    return TrainingCase(
        model=case.model,
        batch=case.batch,
        length=case.length,
        optim=case.optim,
        accumulate=case.accumulate,
        checkpointing=case.checkpointing,
        dtype=case.precision,
        device=case.device,
    )


def generation_of(case: Case) -> InferenceCase:
    return InferenceCase(
        model=case.model,
        batch=1,
        prompt=case.prompt,
        new_tokens=case.new_tokens,
        dtype=case.precision,
        device=case.device,
    )


def time(packed: dict[str, Any]) -> str:
    case = Case.unpack(packed["case"])
    master = master_of(case)
    frozen = freeze(master)
    tokens, targets = batch_of(case)
    identity = identity_row(case, master, frozen, tokens[:1])
    candidates = {**training_candidates(case, master, tokens, targets), **serving_candidates(case, frozen, tokens)}

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        yield identity
        yield from time_rows(case, laps, cold)
        yield from flop_rows(case)
        yield from byte_rows(case)
        yield from peak_rows(case)
        yield from energy_rows(case, candidates)

    return record(packed, candidates, tell)


def prefilling(case: Case) -> dict[str, Condition]:
    """Serving asks the head about the last position alone; the forward of the same batch asks it about all."""
    return case.conditions(batch=1, prompt=case.prompt, tokens=case.prompt, head="last position")


def decoding(case: Case) -> dict[str, Condition]:
    return case.conditions(batch=1, prompt=case.prompt, new_tokens=case.new_tokens, tokens=1, cache=True)


def at_context(case: Case, context: int, cache: bool) -> dict[str, Condition]:
    return case.conditions(batch=1, tokens=1, context=context, cache=cache)


def training_candidates(
    case: Case, master: Any, tokens: Tensor, targets: Tensor, *, optimizer: Optimizer | None = None
) -> Candidates:
    """A phased step for the parts, and an unphased one, which knows nothing of the meter, for the whole."""
    optimizer = optimizer or build(master, case.optim)
    if case.compile:
        master.compile_blocks()
    stopwatch = Stopwatch(clock_for(torch.device(case.device)))

    def step(phase: steps.Phase = steps.unmeasured) -> None:
        steps.train_step(
            master, optimizer, tokens, targets, accumulate=case.accumulate, clip=case.optim.clip, phase=phase
        )

    return {"phased": lambda: stopwatch.lap(step), "whole": lambda: {"whole": spent(case, step)}}


def serving_candidates(case: Case, frozen: Any, tokens: Tensor, *, cache: Any = None) -> Candidates:
    """The full forward on training's batch, a generation, and the cache curve.

    What `compile` compiles is that forward and, of our own model, the step that decodes.
    """
    model: Any = torch.compile(frozen) if case.compile else frozen
    step: Any = steps.decode
    past = cache  # what `step` decodes with
    text = tokens.flatten().repeat(-(-case.model.context // tokens.numel()))[None]  # (1, at least context)
    token = tokens.flatten()[:1, None]  # laid out as a chosen one is: a compiled step would tell them apart
    if cache is None:
        past = cache = KVCache(
            case.model, batch=1, capacity=case.model.context, dtype=frozen.dtype, device=tokens.device
        )
        cache.fill(0)  # the curve looks at positions that no prompt filled: NaN would be slow arithmetic
        if case.compile:
            step, past = compiled_decode(tokens.device.type), StaticKVCache(cache)

    @torch.inference_mode()
    def forward() -> object:
        return model(tokens)

    def prefill() -> object:
        cache.length = 0
        return steps.prefill(frozen, text[:, : case.prompt], cache)

    def decode() -> None:
        chosen = token
        if past is not cache:
            past.length = cache.length  # it holds the same keys and values
        for _ in range(case.new_tokens - 1):
            chosen = step(frozen, chosen, past).argmax(-1, keepdim=True)

    def burst(context: int) -> None:
        for _ in range(BURST):
            past.length = context - 1
            step(frozen, token, past)

    def generation() -> dict[str, float]:
        """TTFT is prefill; TPOT the mean over the tokens decoded after it."""
        return {"prefill": spent(case, prefill), "decode": spent(case, decode) / (case.new_tokens - 1)}

    def curve() -> dict[str, float]:
        points = {}
        for context in contexts(case):
            points[f"cached {context}"] = spent(case, partial(burst, context)) / BURST
            whole = partial(steps.decode_uncached, frozen, text[:, :context])
            points[f"uncached {context}"] = spent(case, whole)
        return points

    return {"frozen": lambda: {"frozen": spent(case, forward)}, "generation": generation, "curve": curve}


def contexts(case: Case) -> list[int]:
    """Where the cache curve is read: up to the model's context, or what is measured of it, by doublings."""
    found = [min(case.model.context, case.measure.context)]
    while found[-1] >= 32 and len(found) < 6:
        found.append(found[-1] // 2)
    return found[::-1]


def by_name(laps: Laps) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = defaultdict(list)
    for rounds in laps.values():
        for lap in rounds:
            for name, time_s in lap.items():
                samples[name].append(time_s)
    return samples


def time_rows(case: Case, laps: Laps, cold: Laps) -> Iterator[Row]:
    samples, first = by_name(laps), by_name(cold)

    def told(name: str, life: str, phase: str, per: str, **conditions: Condition) -> Iterator[Row]:
        """The median of the warm rounds; the very first execution, cold, apart from it."""
        about: dict[str, Any] = {"life": life, "phase": phase, "per": per}
        yield row(case, **about, **timed(samples[name]), conditions=conditions)
        if "context" not in conditions:
            conditions.pop("executions", None)
            about |= {"quantity": "time", "unit": "s", "conditions": {**conditions, "cold": True}}
            yield row(case, **about, value=first[name][0])

    for phase in TRAINING:
        yield from told(phase, "training", phase, "step", **case.training())
    yield from told("whole", "training", "step", "step", **case.training())
    parts = [sum(lap[phase] for phase in TRAINING) for lap in laps["phased"]]
    residual = [whole - sum_ for whole, sum_ in zip(samples["whole"], parts, strict=True)]
    about: dict[str, Any] = {"life": "training", "phase": "residual", "per": "step", "conditions": case.training()}
    yield row(case, **about, **timed(residual))
    yield from told("frozen", "inference", "forward", "step", **case.training())
    yield from told("prefill", "inference", "prefill", "sequence", **prefilling(case))
    yield from told("decode", "inference", "decode", "token", **decoding(case), executions=case.new_tokens - 1)
    for context in contexts(case):
        at = at_context(case, context, cache=True)
        yield from told(f"cached {context}", "inference", "decode", "token", **at, executions=BURST)
        yield from told(f"uncached {context}", "inference", "decode", "token", **at_context(case, context, cache=False))


def training_flops(case: Case, convention: str) -> dict[str, int]:
    return flops.count_training(
        case.model,
        batch=case.batch,
        length=case.length,
        accumulate=case.accumulate,
        checkpointing=case.checkpointing,
        convention=convention,
        optim=case.optim,
    )


def flop_rows(case: Case) -> Iterator[Row]:
    """Counted by dispatch on the meta device, under each convention."""
    middle = case.prompt + case.new_tokens // 2
    for convention in ("model", "causal", "hardware"):
        about: dict[str, Any] = {
            "quantity": "flops",
            "unit": "flop",
            "provenance": "counted",
            "convention": convention,
        }
        training = training_flops(case, convention)
        for phase in TRAINING:
            at = {"life": "training", "phase": phase, "per": "step", "conditions": case.training()}
            yield row(case, **about, **at, value=float(training.get(phase, 0)))
        at = {"life": "inference", "phase": "forward", "per": "step", "conditions": case.training()}
        yield row(case, **about, **at, value=float(training["forward"]))
        prefill = flops.count_prefill(case.model, batch=1, length=case.prompt, convention=convention)
        at = {"life": "inference", "phase": "prefill", "per": "sequence", "conditions": prefilling(case)}
        yield row(case, **about, **at, value=float(prefill))
        decode = flops.count_decode(case.model, batch=1, cached=middle, convention=convention)
        at = {"life": "inference", "phase": "decode", "per": "token", "conditions": decoding(case)}
        yield row(case, **about, **at, value=float(decode))
        for context in contexts(case):
            cached = flops.count_decode(case.model, batch=1, cached=context - 1, convention=convention)
            at["conditions"] = at_context(case, context, cache=True)
            yield row(case, **about, **at, value=float(cached))
            uncached = flops.count_decode_uncached(case.model, batch=1, length=context, convention=convention)
            at["conditions"] = at_context(case, context, cache=False)
            yield row(case, **about, **at, value=float(uncached))


def byte_rows(case: Case) -> Iterator[Row]:
    """The least traffic that each phase needs: what no cache of the machine can spare it."""
    training = footprint.training_bytes(
        case.model,
        batch=case.batch,
        length=case.length,
        dtype=case.precision,
        optimizer=case.rule,
        checkpointing=case.checkpointing,
    )
    size: dict[str, Any] = {"batch": case.batch, "length": case.length, "dtype": case.precision}
    alone: dict[str, Any] = {"batch": 1, "dtype": case.precision}
    middle = case.prompt + case.new_tokens // 2
    prefill = footprint.inference_bytes(case.model, length=case.prompt, **alone)
    decode = footprint.inference_bytes(case.model, cached=middle, **alone)
    for life, phase, per, moved, conditions in (
        *(("training", phase, "step", moved, case.training()) for phase, moved in training.items()),
        ("inference", "forward", "step", footprint.forward_bytes(case.model, **size).total, case.training()),
        ("inference", "prefill", "sequence", prefill.total, prefilling(case)),
        ("inference", "decode", "token", decode.total, decoding(case)),
    ):
        about = {"life": life, "phase": phase, "quantity": "bytes", "unit": "byte", "per": per}
        yield row(case, **about, value=float(moved), provenance="predicted", conditions=conditions)


def peak_rows(case: Case) -> Iterator[Row]:
    """What the hardware asked for could do at most; `here` by the GPU's data sheet, or as calibrated, if either is."""
    if case.hardware == "here":
        hardware = known_here(torch.cuda.get_device_name() if case.device == "cuda" else None)
    else:
        hardware = lookup(case.hardware)
    if hardware is None or case.precision not in hardware.peak_flops_per_s:
        return
    about: dict[str, Any] = {"life": "training", "phase": "run", "per": "run"}
    about["provenance"] = "estimated"
    about["conditions"] = {"hardware": hardware.name, "source": hardware.source, "dtype": case.precision}
    peak = hardware.peak_flops_per_s[case.precision]
    yield row(case, **about, quantity="peak_flops", unit="flop/s", value=peak)
    yield row(case, **about, quantity="peak_bandwidth", unit="byte/s", value=hardware.bandwidth_bytes_per_s)


def energy_rows(case: Case, candidates: Candidates) -> Iterator[Row]:
    """Of a whole training step and of a whole generation, each repeated inside one window."""
    reader = open_reader(case.measure.energy, torch.device(case.device))
    for name, life, phase, per, conditions in (
        ("whole", "training", "step", "step", case.training()),
        ("generation", "inference", "run", "sequence", {**decoding(case), "tokens": case.new_tokens}),
    ):
        energy = reader.window(candidates[name])
        about = {"life": life, "phase": phase, "quantity": "energy", "unit": "joule", "per": per}
        how = {"provenance": energy.provenance, "reason": energy.reason}
        yield row(case, **about, **how, value=energy.energy_j, conditions=conditions)


def memory_rows(
    case: Case, what: TrainingCase | InferenceCase, life: str, conditions: dict[str, Condition]
) -> Iterator[Row]:
    """One row that says why, where the system does not tell a peak."""
    if why := why_unreadable(case.device):
        whole = (
            ("step", "step")
            if isinstance(what, TrainingCase)
            else ("run" if what.new_tokens else "forward", "sequence")
        )
        about: dict[str, Any] = {"life": life, "quantity": "memory", "unit": "byte", "conditions": conditions}
        yield row(case, **about, phase=whole[0], per=whole[1], value=None, provenance="unavailable", reason=why)
        return
    yield from account_rows(case, life, done(account(what, threads=case.threads), "memory"), conditions)


def account_rows(case: Case, life: str, found: Account, conditions: dict[str, Condition]) -> Iterator[Row]:
    """The measured peak of each phase, and of the whole by category, what is unexplained among them."""
    about: dict[str, Any] = {"life": life, "quantity": "memory", "unit": "byte"}
    about["per"] = "step" if life == "training" else "sequence"
    for phase, peak in found.measured.items():
        yield row(case, **about, phase=phase, value=float(peak), conditions=conditions)
    if list(found.measured) == ["forward"]:
        return  # a single phase needs no account of the whole
    about["phase"] = "step" if life == "training" else "run"
    held = {**found.rows, "measured peak": found.measured_bytes}
    for category, size in held.items():
        kind = (
            "measured"
            if category in ("unexplained", "kernel buffers", "kernel workspace", "measured peak")
            else "counted"
        )
        more = {"category": category, "peak_phase": found.ledger.peak_phase}
        yield row(case, **about, value=float(size), provenance=kind, conditions={**conditions, **more})
