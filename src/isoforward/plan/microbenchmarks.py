"""What kernels take one by one, over and over: memory at every size, the largest products, an optimizer's updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median

import torch

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.measure.operators import Call, Operator, record_training

OPTIMIZED = (64, 256, 1024)  # widths whose optimizer is timed
SAMPLE_S, REPEATS = 0.002, 3


def timed(call: Callable[[], object], pick: Callable[[list[float]], float] = median) -> float:
    """Seconds of one execution, the median of several samples; each long enough for the clock."""
    call()
    start = time.perf_counter()
    call()
    once_s = time.perf_counter() - start
    times = max(1, min(200, int(SAMPLE_S / max(once_s, 1e-7))))
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(times):
            call()
        samples.append((time.perf_counter() - start) / times)
    return pick(samples)


def optimizer_calls() -> Iterator[tuple[Operator, Call]]:
    for family in ("gpt2", "llama"):
        for width in OPTIMIZED:
            model = ModelConfig(family=family, layers=1, width=width, heads=width // 32, vocab=1024, context=64)
            recorder = record_training(model, batch=1, length=16, dtype=torch.float32, optim=OptimConfig())
            calls = recorder.examples
            yield from ((operator, calls[operator]) for operator in recorder.counts["optimizer"] if operator in calls)


@torch.no_grad()
def time_apart(calls: Mapping[Operator, Call]) -> dict[Operator, float]:
    return {operator: timed(call.real()) for operator, call in calls.items()}


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


def most_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the quickest of products that fill the caches."""
    rates = []
    for n in (512, 768, 1024, 1536):
        a = torch.ones(n, n, dtype=dtype)
        rates.append(2 * n**3 / timed(partial(torch.mm, a, a), min))
    return max(rates)
