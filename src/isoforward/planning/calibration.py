"""What this machine takes for each operator of a GPT: measured over a grid of sizes, for forecast.py to read between.

Every operator runs alone on tensors of its own, in rounds of an order drawn anew, so that the machine's mood is no
operator's own. Then a few small models run whole: what a phase takes beyond its operators is laid to each operator
dispatched (autograd, Python) and to each byte that a step newly touches (page faults, cold caches).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoforward.config import MeasureConfig, ModelConfig, OptimConfig
from isoforward.hardware import environment, reference_kernel
from isoforward.inference import DTYPES
from isoforward.measuring.account import account
from isoforward.measuring.both_lives import by_name, serving_candidates, step_of, training_candidates
from isoforward.measuring.case import Case, batch_of, master_of
from isoforward.measuring.estimates import interleaved
from isoforward.measuring.isolate import Failed
from isoforward.measuring.operators import Call, Operator, described, record_serving, record_training
from isoforward.planning.devices import Hardware
from isoforward.planning.forecast import Beyond, Calibrated, resident, works_of
from isoforward.weights import freeze

WIDTHS = (64, 256, 1024)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
MOST_FLOPS, MOST_BYTES = 2.5e9, 2**26  # of one operator that is measured
ROUNDS, SAMPLES, SAMPLE_S = 2, 3, 0.002
TOGETHER, LOOKS = 16, 5  # operators between two looks at the machine's pace; looks that make the first


def grid() -> dict[Operator, Callable[[], Call]]:
    """Operators with what makes each of them ready to run."""
    found: dict[Operator, Callable[[], Call]] = {}
    for dtype in DTYPES.values():
        for call in [*products(dtype), *attentions(dtype)]:
            found.setdefault(described(call, call()), call.real)
    taken = set()
    for operator, call in recorded():
        scale = (operator.kind, round(2 * math.log2(operator.work)))
        if operator.work <= MOST_BYTES and scale not in taken and not operator.is_product:
            taken.add(scale)
            found[operator] = call.real
    return found


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def products(dtype: torch.dtype) -> Iterator[Call]:
    """tokens x inputs x outputs: in forward, for the input's gradient, for the weight's."""
    for tokens in TOKENS:
        for width in WIDTHS:
            for k, n in ((width, width), (width, 4 * width), (4 * width, width)):
                if 2 * tokens * k * n > MOST_FLOPS:
                    continue
                x, w, y = (meta(*shape, dtype=dtype) for shape in ((tokens, k), (n, k), (tokens, n)))
                for pair in ((x, w.t()), (y, w), (y.t(), x)):
                    yield Call(function=torch.ops.aten.mm.default, arguments=pair)


def attentions(dtype: torch.dtype) -> Iterator[Call]:
    aten = torch.ops.aten
    for heads, D in ((4, 32), (32, 32), (16, 64), (128, 64)):
        for T, S in ((16, 16), (64, 64), (256, 256), (1024, 1024), (1, 32), (1, 256), (1, 1024)):
            if 10 * heads * T * S * D > MOST_FLOPS:
                continue
            # as our model lays them out: (B, T, H, D), seen as (B, H, T, D)
            q, k, v = (meta(1, n, heads, D, dtype=dtype).transpose(1, 2) for n in (T, S, S))
            forward = aten._scaled_dot_product_flash_attention_for_cpu.default
            yield Call(function=forward, arguments=(q, k, v, 0.0, T > 1))
            if T > 1:
                summed = meta(1, heads, T, dtype=torch.float32)
                backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
                yield Call(function=backward, arguments=(q, q, k, v, q, summed, 0.0, True))


def recorded() -> Iterator[tuple[Operator, Call]]:
    """Everything else, from models small and large."""
    for family in ("gpt2", "llama"):
        for dtype in DTYPES.values():
            for width, batch, length in ((64, 1, 16), (256, 1, 64), (256, 4, 256), (1024, 4, 512)):
                model = ModelConfig(
                    family=family, layers=1, width=width, heads=width // 32, vocab=1024, context=max(length, 64)
                )
                yield from record_training(
                    model, batch=batch, length=length, dtype=dtype, optim=OptimConfig()
                ).examples.items()
                yield from record_serving(
                    model, batch=batch, length=length, cached=length // 2, dtype=dtype
                ).examples.items()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one execution, the median of several samples; each long enough for the clock."""
    call()
    start = time.perf_counter()
    call()
    once_s = time.perf_counter() - start
    times = max(1, min(200, int(SAMPLE_S / max(once_s, 1e-7))))
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(times):
            call()
        samples.append((time.perf_counter() - start) / times)
    return median(samples)


def references() -> dict[str, Callable[[], float]]:
    """Seconds of what never changes: the machine's pace, of products, of memory and of dispatch."""
    numbers, one = torch.ones(2**22), torch.ones(1)
    return {
        "product": reference_kernel("cpu"),
        "memory": lambda: timed(numbers.sum),
        "dispatch": lambda: timed(lambda: one + one),
    }


def pace(now_s: Mapping[str, float], then_s: Mapping[str, float]) -> float:
    """How much longer the machine takes than it did: no phase is of one kind alone, so the geometric mean of all."""
    return math.prod(now_s[name] / then_s[name] for name in then_s) ** (1 / len(then_s))


class Pace:
    """A virtual machine's clock may run at two speeds: what is timed is told at the speed of the first look."""

    def __init__(self) -> None:
        self.runs = references()
        looks = [self.look() for _ in range(LOOKS)]
        self.first_s = {name: median(each[name] for each in looks) for name in self.runs}
        self.least = 1.0

    def look(self) -> dict[str, float]:
        return {name: run() for name, run in self.runs.items()}

    def now(self) -> float:
        now = pace(self.look(), self.first_s)
        self.least = min(self.least, now)
        return now


@torch.no_grad()
def time_operators(
    operators: Mapping[Operator, Callable[[], Call]], paced: Pace, *, seed: int = 0
) -> dict[Operator, float]:
    draw, samples = random.Random(seed), defaultdict(list)
    for _ in range(ROUNDS):
        order, before = draw.sample(list(operators), len(operators)), paced.now()
        for start in range(0, len(order), TOGETHER):
            block = order[start : start + TOGETHER]
            times_s = [timed(operators[operator]()) for operator in block]
            after = paced.now()
            for operator, time_s in zip(block, times_s, strict=True):
                samples[operator].append(time_s / math.sqrt(before * after))
            before = after
    return {operator: median(each) for operator, each in samples.items()}


def reading() -> list[tuple[int, float]]:
    """Bytes that lie together, and the bytes a second at which they are read over and over."""
    found = []
    for size in (2**18, 2**20, 2**22, 2**24, 2**26, 2**28):
        numbers = torch.ones(size // 4)
        found.append((size, size / timed(numbers.sum)))
    return found


def copying() -> float:
    """Bytes a second read and written, beyond every cache."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * 4 * 2**26 / timed(lambda: target.copy_(source))


# Whole phases


PROBES: tuple[dict[str, Any], ...] = (  # shapes apart from those that predict.py asks about
    {"family": "gpt2", "width": 64, "heads": 2, "layers": 4, "batch": 1, "length": 32, "dtype": "fp32"},
    {"family": "llama", "width": 64, "heads": 2, "layers": 4, "batch": 1, "length": 32, "dtype": "bf16"},
    {"family": "gpt2", "width": 320, "heads": 5, "layers": 4, "batch": 4, "length": 160, "dtype": "fp32"},
    {"family": "llama", "width": 320, "heads": 5, "layers": 3, "batch": 2, "length": 160, "dtype": "bf16"},
    {"family": "llama", "width": 640, "heads": 10, "layers": 3, "batch": 1, "length": 96, "dtype": "fp32"},
)


def probe(shape: Mapping[str, Any]) -> Case:
    keys = ("family", "width", "heads", "layers")
    model = ModelConfig(**{key: shape[key] for key in keys}, vocab=1024, context=192)
    settings = MeasureConfig(repeats=7, warmup=2, prompt=32, new_tokens=32)
    size = {"batch": shape["batch"], "length": shape["length"], "precision": shape["dtype"]}
    return Case(experiment="calibrate", model=model, measure=settings, threads=torch.get_num_threads(), **size)


def time_phases(case: Case, paced: Pace) -> dict[str, float]:
    """Medians of a phased training step and of a generation."""
    laps = interleaved({**phased(case), "references": paced.look}, case.measure.warmup + case.measure.repeats)
    warm = {name: each[case.measure.warmup :] for name, each in laps.items()}
    took_s = {name: median(samples) for name, samples in by_name(warm).items()}
    slower = pace(took_s, paced.first_s)
    return {name: time_s / slower for name, time_s in took_s.items()}


def phased(case: Case) -> dict[str, Callable[[], dict[str, float]]]:
    master = master_of(case)
    tokens, targets = batch_of(case)
    training = training_candidates(case, master, tokens, targets)
    return {"phased": training["phased"], "generation": serving_candidates(case, freeze(master), tokens)["generation"]}


def beyond(alone_s: list[float], dispatched: list[int], took_s: list[float]) -> Beyond:
    """The least relative squares; neither part below nothing."""
    took = np.array(took_s)
    parts = np.stack([np.array(alone_s), np.array(dispatched)], axis=1) / took[:, None]
    scale, dispatch_s = np.linalg.lstsq(parts, np.ones(len(took)), rcond=None)[0]
    if dispatch_s < 0:
        return Beyond(scale=float(parts[:, 0].sum() / (parts[:, 0] ** 2).sum()), dispatch_s=0.0)
    if scale < 0.5:  # tiny models tell of dispatch alone
        rest = np.maximum(1 - 0.5 * parts[:, 0], 0)
        return Beyond(scale=0.5, dispatch_s=float((rest * parts[:, 1]).sum() / (parts[:, 1] ** 2).sum()))
    return Beyond(scale=float(scale), dispatch_s=float(dispatch_s))


def calibrate(say: Callable[[str], None] = lambda line: None) -> Hardware:
    """About two minutes of both threads' and caches' attention: nothing else should run."""
    device = torch.device("cpu")
    paced = Pace()
    say("memory bandwidth")
    rates, copied, slower = reading(), copying(), paced.now()
    rates = [(size, rate * slower) for size, rate in rates]
    say("operators")
    costs = time_operators(grid(), paced)
    points: dict[str, list[list[float]]] = defaultdict(list)
    for operator, took_s in costs.items():
        points[operator.kind].append([*operator.size, took_s / operator.work])
    alone = Calibrated(operators=points, reading=[list(rate) for rate in rates], beyond={})
    say("whole phases")
    told: dict[str, list[tuple[float, int, float]]] = defaultdict(list)
    for shape in PROBES:
        case = probe(shape)
        took = time_phases(case, paced)
        for phase, work in works_of(case).items():
            told[phase].append((alone.operators_s(work, resident(case, phase))[0], work.dispatched, took[phase]))
    fits = {phase: asdict(beyond(*map(list, zip(*each, strict=True)))) for phase, each in told.items()}
    say("memory that kernels keep")
    kept = kernel_buffers(probe(PROBES[2]))
    where = environment("calibrate", device)
    content: dict[str, Any] = {
        "created": where.created,
        "identity": dict(where.identity),
        "references_s": paced.first_s,
        "reading": rates,
        "copying_bytes_per_s": copied,
        "kernel_buffers_bytes": kept,
        "operators": dict(points),
        "beyond": fits,
    }
    content["id"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    peaks = {
        dtype: max(o.work / s for o, s in costs.items() if o.kind.startswith("product") and o.kind.endswith(f" {name}"))
        / paced.least
        for dtype, name in (("fp32", "float32"), ("bf16", "bfloat16"))
    }
    threads = torch.get_num_threads()
    return Hardware(
        name=f"{where.identity['cpu']}, {threads} thread{'s' * (threads > 1)}",
        peak_flops_per_s=peaks,
        bandwidth_bytes_per_s=rates[-1][1] / paced.least,
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        source=f"experiments/calibrate.py, {where.created}, torch {where.identity['torch']}",
        provenance="measured",
        calibration=content,
    )


def kernel_buffers(case: Case) -> int:
    """Bytes that libraries keep when every tensor of a training step is gone."""
    found = account(step_of(case), threads=case.threads)
    return 0 if isinstance(found, Failed) else max(0, found.kernels_bytes)
