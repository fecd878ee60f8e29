"""What kernels take one by one, over and over: memory at every size, the largest products, an optimizer's updates.

All of them through the runner that everything else is timed by: what something else disturbed is taken again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import TypeVar

import torch

from isoforward.base.config import MeasureConfig, ModelConfig, OptimConfig
from isoforward.base.device import device_of
from isoforward.base.stopwatch import Clock
from isoforward.measure.benchmark import Part, measure, timed
from isoforward.measure.operators import Call, Operator, record_training
from isoforward.measure.trust import Findings, findings

Key = TypeVar("Key")
OPTIMIZED = (64, 256, 1024)  # widths whose optimizer is timed
PLAN = MeasureConfig(repeats=5, warmup=1)


def timed_apart(
    calls: Mapping[Key, Callable[[], object]], clock: Clock | None = None
) -> tuple[dict[Key, tuple[float, ...]], Findings]:
    """Seconds of one execution, in several samples of each, and what disturbed them."""
    clock = clock or device_of("cpu")
    part = Part(life="training", phase="run", per="run", conditions={})
    works = {key: timed(clock, part.labelled(), call) for key, call in calls.items()}
    measured = measure(list(works.values()), [], PLAN, seed=0)
    samples = {key: tuple(measured.estimate(work.parts[0]).samples) for key, work in works.items()}
    return samples, findings(measured)


def optimizer_calls() -> Iterator[tuple[Operator, Call]]:
    for family in ("gpt2", "llama"):
        for width in OPTIMIZED:
            model = ModelConfig(family=family, layers=1, width=width, heads=width // 32, vocab=1024, context=64)
            recorder = record_training(model, batch=1, length=16, dtype=torch.float32, optim=OptimConfig())
            calls = recorder.examples
            yield from ((operator, calls[operator]) for operator in recorder.counts["optimizer"] if operator in calls)


@torch.no_grad()
def time_operators(calls: Mapping[Operator, Call]) -> tuple[dict[Operator, float], Findings]:
    samples, found = timed_apart({operator: call.real() for operator, call in calls.items()})
    return {operator: median(each) for operator, each in samples.items()}, found


def reading() -> tuple[list[tuple[int, float]], Findings]:
    """Bytes that lie together, and the bytes a second at which they are read over and over."""
    sizes = (2**18, 2**20, 2**22, 2**24, 2**26, 2**28)
    samples, found = timed_apart({size: torch.ones(size // 4).sum for size in sizes})
    return [(size, size / median(samples[size])) for size in sizes], found


def copying() -> tuple[float, Findings]:
    """Bytes a second read and written, beyond every cache."""
    source = torch.ones(2**26)
    samples, found = timed_apart({"copy": partial(torch.empty_like(source).copy_, source)})
    return 2 * 4 * 2**26 / median(samples["copy"]), found


def most_flops(dtype: torch.dtype) -> tuple[float, Findings]:
    """FLOP/s of the quickest of products that fill the caches."""
    sides = (512, 768, 1024, 1536)
    squares = {n: torch.ones(n, n, dtype=dtype) for n in sides}
    samples, found = timed_apart({n: partial(torch.mm, square, square) for n, square in squares.items()})
    return max(2 * n**3 / min(samples[n]) for n in sides), found
