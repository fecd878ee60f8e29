"""How fast training goes, as it is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """Time of training steps, with their data and Lightning's own part, without validation and checkpoints.

    The first step is left out: it loads libraries and compiles. `settle` waits until the device has done its work.
    """

    def __init__(self, settle: Callable[[], object] = lambda: None, now: Callable[[], float] = time.monotonic) -> None:
        self.settle, self.now = settle, now
        self.steps = 0  # after the first
        self.begun: float | None = None
        self.stopped_at: float | None = None  # while paused
        self.paused_s = 0.0
        self.depth = 0

    def step_done(self) -> None:
        if self.begun is None:
            self.settle()
            self.begun = self.now()
        else:
            self.steps += 1

    def pause(self) -> None:
        if self.depth == 0:
            self.settle()
            self.stopped_at = self.now()
        self.depth += 1

    def resume(self) -> None:
        self.depth -= 1
        if self.depth == 0 and self.stopped_at is not None:
            if self.begun is not None:
                self.paused_s += self.now() - max(self.stopped_at, self.begun)
            self.stopped_at = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def steps_per_s(self) -> float | None:
        """None before a second step is done."""
        if self.begun is None or not self.steps:
            return None
        until = self.now() if self.stopped_at is None else self.stopped_at
        return self.steps / max(until - self.begun - self.paused_s, 1e-9)


def told_loss(loss: float, bits_per_byte: float | None) -> str:
    """For example "2.345 nats/token 1.234 bits/byte"."""
    return f"{loss:.3f} nats/token" + ("" if bits_per_byte is None else f" {bits_per_byte:.3f} bits/byte")
