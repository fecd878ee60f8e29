"""Seconds of named phases, with no opinion on what is measured.

A step's timeline is covered without a gap: what lies inside a phase is that phase's, what lies between phases is
`residual`. Marks are taken, never resolved, while the measured code runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

Mark = Any


class Clock(Protocol):
    def mark(self) -> Mark: ...
    def seconds(self, start: Mark, end: Mark) -> float: ...
    def settle(self) -> None:
        """Until every mark taken so far can be resolved."""


def spent(clock: Clock, work: Callable[[], object]) -> float:
    """Seconds, with one synchronisation, at the end."""
    start = clock.mark()
    work()
    end = clock.mark()
    clock.settle()
    return clock.seconds(start, end)


class _Span:
    def __init__(self, stopwatch: Stopwatch, name: str) -> None:
        self.stopwatch, self.name = stopwatch, name

    def __enter__(self) -> None:
        self.start = self.stopwatch.clock.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopwatch.spans.append((self.name, self.start, self.stopwatch.clock.mark()))


class Stopwatch:
    """Pass it as `phase`; wrap each step in `step()`; read `laps()` after the loop."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spans: list[tuple[str, Mark, Mark]] = []
        self.steps: list[tuple[Mark, Mark, list[tuple[str, Mark, Mark]]]] = []

    def __call__(self, name: str) -> _Span:
        return _Span(self, name)

    @contextmanager
    def step(self) -> Iterator[None]:
        self.spans = []
        start = self.clock.mark()
        yield
        self.steps.append((start, self.clock.mark(), self.spans))

    def lap(self, body: Callable[[Stopwatch], object]) -> dict[str, float]:
        """The laps of one step alone, which `body` takes with this as its `phase`."""
        with self.step():
            body(self)
        (lap,) = self.laps()
        return lap

    def laps(self) -> list[dict[str, float]]:
        """Seconds of every phase that ran, step by step; `step` is its whole and `residual` what no phase held.

        A phase that did not run is absent.
        """
        self.clock.settle()
        laps = []
        for start, end, spans in self.steps:
            lap: defaultdict[str, float] = defaultdict(float)
            at = start
            for name, opened, closed in spans:
                lap["residual"] += self.clock.seconds(at, opened)
                lap[name] += self.clock.seconds(opened, closed)
                at = closed
            lap["residual"] += self.clock.seconds(at, end)
            lap["step"] = self.clock.seconds(start, end)
            laps.append(dict(lap))
        self.steps = []
        return laps
