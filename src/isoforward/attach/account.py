"""Every moment of an optimizer step belongs to exactly one phase: the innermost that is open, or else `residual`.

A step begins where its first batch is fetched and ends where the next one's is, after the optimizer has stepped. Loops
without a loader are cut at the forward instead. Validation and checkpointing happen now and then: they are totals of
the run, and no part of a step.

Of a step that is not timed by phase nothing is kept but the mark where it begins.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from isoforward.attach.sampling import TIMED, WHOLE, Draws, Sampling
from isoforward.base.stopwatch import Clock, Mark

DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER, RESIDUAL = "data", "forward", "loss", "backward", "optimizer", "residual"
IN_STEP = (DATA, "transfer", FORWARD, LOSS, BACKWARD, "clipping", OPTIMIZER, "communication", "logging", RESIDUAL)
OCCASIONS = ("validation", "checkpointing")
AFTER_FORWARD = "after forward"  # loss where a backward follows, forward where another forward does
IGNORED = -1
RESOLVED_TOGETHER = 64  # steps, at least: resolving waits for the device


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    kind: str
    seconds: float  # without validation and checkpointing
    phases: Mapping[str, float]  # of a timed step; they add up to its seconds
    backwards: int  # calls of backward: its micro-batches, where there is one loss


class _Unresolved(NamedTuple):
    kind: str
    events: list[tuple[Mark, str]]  # from that mark on, that phase
    end: Mark
    backwards: int
    complete: bool


class Account:
    """`enter` and `leave` phases as they come; read `steps` and `occasions_s` after `close`."""

    def __init__(self, clock: Clock, sampling: Sampling) -> None:
        self.clock = clock
        self.draws = Draws(sampling)
        self.runs = self.draws.runs()
        self.between_runs: Callable[[str], object] = lambda kind: None  # told the kind of the steps that begin
        self.stack: list[str] = []
        self.occasions = 0  # of those that are open
        self.unresolved: list[_Unresolved] = []
        self.steps: list[Step] = []
        self.occasions_s: defaultdict[str, float] = defaultdict(float)
        self.count = 0
        self._begin_run()
        self._begin(clock.mark())

    @property
    def phase(self) -> str:
        return self.stack[-1] if self.stack else RESIDUAL

    def enter(self, phase: str) -> int:
        """What `leave` wants, so that a phase which was left by an exception is closed by the one around it.

        IGNORED where it is not timed: there is then nothing to leave.
        """
        occasion = phase in OCCASIONS
        if self.occasions and not occasion:
            return IGNORED
        if self.stepped and (phase == DATA or (phase == FORWARD and not self.fetched)):
            self.cut()
        self.fetched |= phase == DATA
        self.backwards += phase == BACKWARD
        if not (self.by_phase or occasion):
            return IGNORED
        if phase in (DATA, FORWARD, BACKWARD):
            self._end_of_loss()
        self.occasions += occasion
        self.stack.append(phase)
        self._mark(phase, occasion)
        return len(self.stack) - 1

    def leave(self, depth: int) -> None:
        if depth == IGNORED:
            return
        closed = sum(phase in OCCASIONS for phase in self.stack[depth:]) if self.occasions else 0
        self.occasions -= closed
        del self.stack[depth:]
        self._mark(self.phase, closed > 0)

    def forward_ended(self, depth: int) -> None:
        if depth != IGNORED:
            del self.stack[depth:]
            self.stack.append(AFTER_FORWARD)
            self._mark(AFTER_FORWARD)

    def step_begins(self, *, leads: bool) -> int:
        """An optimizer's step. The one that leads is the one whose steps are counted, where there are several."""
        if leads and self.stepped and not self.occasions:  # a batch was fetched once and is trained on again and again
            self.cut()
        if self.occasions or not self.by_phase:
            return IGNORED
        self._end_of_loss()
        return self.enter(OPTIMIZER)

    def step_ended(self, depth: int, *, leads: bool) -> None:
        if depth != IGNORED:
            self.leave(depth)
        self.stepped |= leads and not self.occasions

    def cut(self) -> None:
        """Where a step ends the next one begins. What is done between two runs of steps is in neither of them."""
        boundary = self.clock.mark()
        self.unresolved.append(_Unresolved(self.kind, self.events, boundary, self.backwards, True))
        self.count += 1
        self.left -= 1
        if not self.left:
            self._begin_run()
            boundary = self.clock.mark()
        self._begin(boundary)

    def close(self) -> None:
        """The last step counts where its optimizer has stepped; what came after it does too."""
        end = self.clock.mark()
        self.unresolved.append(_Unresolved(self.kind, self.events, end, self.backwards, self.stepped))
        self.by_phase = False
        self.resolve()

    def resolve(self) -> None:
        self.clock.settle()
        for step in self.unresolved:
            phases: defaultdict[str, float] = defaultdict(float)
            marks = [mark for mark, _ in step.events] + [step.end]
            for phase, (start, end) in zip(_told(step.events), pairwise(marks), strict=True):
                phases[phase] += self.clock.seconds(start, end)
            for occasion in OCCASIONS:
                if occasion in phases:
                    self.occasions_s[occasion] += phases.pop(occasion)
            if step.complete:
                kept, seconds = dict(phases) if step.kind == TIMED else {}, sum(phases.values())
                self.steps.append(Step(kind=step.kind, seconds=seconds, phases=kept, backwards=step.backwards))
                self.draws.took(step.kind, seconds)
        self.unresolved = []

    def _begin_run(self) -> None:
        if len(self.unresolved) >= RESOLVED_TOGETHER:
            self.resolve()
        self.stack.clear()
        self.kind, self.left = next(self.runs)
        self.by_phase = self.kind != WHOLE or not self.count  # at first, to learn which modules are called
        began = time.perf_counter()
        self.between_runs(self.kind)
        self.draws.changed(self.kind, time.perf_counter() - began)

    def _begin(self, start: Mark) -> None:
        self.stepped = self.fetched = False
        self.backwards = 0
        self.events = [(start, RESIDUAL)]

    def _mark(self, phase: str, occasion: bool = False) -> None:
        if self.kind == TIMED or occasion:
            self.events.append((self.clock.mark(), phase))

    def _end_of_loss(self) -> None:
        if self.stack and self.stack[-1] == AFTER_FORWARD:
            self.stack.pop()


def _told(events: list[tuple[Mark, str]]) -> list[str]:
    """Phases, with what came after a forward told by what followed."""
    phases, following = [], RESIDUAL
    for _, phase in reversed(events):
        following = {FORWARD: FORWARD, BACKWARD: LOSS, DATA: RESIDUAL}.get(phase, following)
        phases.append(following if phase == AFTER_FORWARD else phase)
    return phases[::-1]
