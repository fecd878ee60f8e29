"""Every moment of an optimizer step belongs to exactly one phase: the innermost that is open, or else `residual`.

A step begins where its first batch is fetched and ends where the next one's is, after the optimizer has stepped. Loops
without a loader are cut at the forward instead. Validation and checkpointing happen now and then: they are totals of
the run, and no part of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from isoforward.attach.sampling import COUNTED, TIMED, Draws, Sampling
from isoforward.base.stopwatch import Clock, Mark

DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER, RESIDUAL = "data", "forward", "loss", "backward", "optimizer", "residual"
IN_STEP = (DATA, "transfer", FORWARD, LOSS, BACKWARD, "clipping", OPTIMIZER, "communication", "logging", RESIDUAL)
OCCASIONS = ("validation", "checkpointing")
AFTER_FORWARD = "after forward"  # loss where a backward follows, forward where another forward does
IGNORED = -1
RESOLVED_TOGETHER = 64  # steps: resolving waits for the device


@dataclass(frozen=True, kw_only=True)
class Step:
    kind: str
    seconds: float  # without validation and checkpointing
    phases: Mapping[str, float]  # of a timed step; they add up to its seconds
    backwards: int  # calls of backward: its micro-batches, where there is one loss


@dataclass(frozen=True, kw_only=True)
class _Unresolved:
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
        self.between_steps: Callable[[str], object] = lambda kind: None  # told the kind of the step that begins
        self.stack: list[str] = []
        self.occasions = 0  # of those that are open
        self.unresolved: list[_Unresolved] = []
        self.steps: list[Step] = []
        self.occasions_s: defaultdict[str, float] = defaultdict(float)
        self.count = 0
        self._begin()

    @property
    def phase(self) -> str:
        return self.stack[-1] if self.stack else RESIDUAL

    def enter(self, phase: str) -> int:
        """What `leave` wants, so that a phase which was left by an exception is closed by the one around it."""
        occasion = phase in OCCASIONS
        if self.occasions and not occasion:
            return IGNORED
        if phase in (DATA, FORWARD, BACKWARD):
            self._end_of_loss()
        if self.stepped and (phase == DATA or (phase == FORWARD and not self.fetched)):
            self.cut()
        self.fetched |= phase == DATA
        self.backwards += phase == BACKWARD
        self.occasions += occasion
        self.stack.append(phase)
        self._mark(occasion)
        return len(self.stack) - 1

    def leave(self, depth: int) -> None:
        if depth == IGNORED:
            return
        closed = sum(phase in OCCASIONS for phase in self.stack[depth:]) if self.occasions else 0
        self.occasions -= closed
        del self.stack[depth:]
        self._mark(closed > 0)

    def forward_ended(self, depth: int) -> None:
        if depth != IGNORED:
            del self.stack[depth:]
            self.stack.append(AFTER_FORWARD)
            self._mark()

    def step_begins(self, *, leads: bool) -> int:
        """An optimizer's step. The one that leads is the one whose steps are counted, where there are several."""
        if not self.occasions:
            self._end_of_loss()
            if leads and self.stepped:  # a batch was fetched once and is trained on again and again
                self.cut()
        return self.enter(OPTIMIZER)

    def step_ended(self, depth: int, *, leads: bool) -> None:
        self.leave(depth)
        self.stepped |= leads and depth != IGNORED

    def cut(self) -> None:
        self._keep(complete=True)
        self.count += 1
        self.stack.clear()
        self.occasions = 0
        if len(self.unresolved) >= RESOLVED_TOGETHER:
            self.resolve()
        self._begin()

    def close(self) -> None:
        """The last step counts where its optimizer has stepped; what came after it does too."""
        self._keep(complete=self.stepped)
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

    def _begin(self) -> None:
        self.kind = self.draws.kind(self.count)
        self.by_phase = self.kind in (TIMED, COUNTED)  # or only what tells where the step ends
        self.between_steps(self.kind)
        self.stepped = self.fetched = False
        self.backwards = 0
        self.events = [(self.clock.mark(), self.phase)]

    def _keep(self, *, complete: bool) -> None:
        end = self.clock.mark()
        self.unresolved.append(
            _Unresolved(kind=self.kind, events=self.events, end=end, backwards=self.backwards, complete=complete)
        )

    def _mark(self, occasion: bool = False) -> None:
        if self.kind == TIMED or occasion:
            self.events.append((self.clock.mark(), self.phase))

    def _end_of_loss(self) -> None:
        if self.phase == AFTER_FORWARD:
            self.stack.pop()


def _told(events: list[tuple[Mark, str]]) -> list[str]:
    """Phases, with what came after a forward told by what followed."""
    phases, following = [], RESIDUAL
    for _, phase in reversed(events):
        following = {FORWARD: FORWARD, BACKWARD: LOSS, DATA: RESIDUAL}.get(phase, following)
        phases.append(following if phase == AFTER_FORWARD else phase)
    return phases[::-1]
