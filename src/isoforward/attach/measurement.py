"""One training that is watched, from its first step to its last."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from isoforward.attach.account import AFTER_FORWARD, LOSS, Account
from isoforward.attach.findings import NAME, Watched, phases_of
from isoforward.attach.hooks import Hooks
from isoforward.attach.modules import compiled, trained_by
from isoforward.attach.ranks import ALONE, Ranks
from isoforward.attach.sampling import COUNTED, TIMED, Sampling
from isoforward.attach.sentence import sentence, shown
from isoforward.attach.step_flops import StepFlops
from isoforward.attach.step_memory import StepMemory
from isoforward.base.device import device_of
from isoforward.base.disturbance import between, look
from isoforward.base.errors import Refusal
from isoforward.base.stopwatch import Clock
from isoforward.measure.memory_ledger import optimizer_state
from isoforward.show.phases import Phases
from isoforward.show.report import write_report
from isoforward.show.wandb_tracker import tell_open_run


class Measurement:
    """`start`, then the training, then `stop`; `phases` makes rows of what was seen."""

    def __init__(self, sampling: Sampling, *, clock: Clock | None = None, validation_by_mode: bool = False) -> None:
        self.sampling, self.clock = sampling, clock
        self.validation_by_mode = validation_by_mode
        self.ranks = ALONE
        self.flops: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.counting = ExitStack()

    def start(self, roots: Iterable[nn.Module] = (), lead: Optimizer | None = None) -> Hooks:
        """Without `roots` they are found once the first step is done, by the weights that its optimizers updated; which
        of them are called, in the second.
        """
        self.before, self.asked = look(), lead
        roots = list(roots)
        sampling = self.sampling if roots else replace(self.sampling, warmup=max(2, self.sampling.warmup))
        self.account = Account(self.clock or device_of(device(roots)), sampling)
        self.hooks = Hooks(self.account, lead=lead, validation_by_mode=self.validation_by_mode)
        self.account.between_runs = self._between_runs
        self.hooks.watch_torch()
        try:
            for root in roots:
                self.hooks.watch_module(root)
            self._between_runs(self.account.kind)
        except BaseException:
            self.hooks.undo()
            raise
        return self.hooks

    def stop(self) -> None:
        self.hooks.undo()
        self.counting.close()
        self.account.close()
        if self.account.stepped:
            self.hooks.run_ended()
        self.after = look()

    def finish(self, path: Path, *, ended: bool, command: str = "") -> Phases:
        """Stops; rank 0 says on standard error what was found, and appends the rows to `path`, with a report beside it.

        Nothing is written where there are none. A W&B run that is open gets both. Where they cannot be written it says
        so: how the training ends stays its own.
        """
        self.stop()
        phases = self.phases(ended=ended, command=command)
        if self.ranks.rank == 0:
            print(shown(phases), file=sys.stderr)
            found, page = phases.results, path.with_name("report.html")
            if not found.rows:
                return phases
            try:
                phases.write(path)
                print(write_report(found, page, headline=sentence(found), title=command or NAME), file=sys.stderr)
                tell_open_run(found, page)
            except Refusal as refusal:
                print(f"error: {refusal}", file=sys.stderr)
        return phases

    def figures(self) -> dict[str, float]:
        """For a logger: seconds of each phase in the timed step that is known last, and of all of it."""
        self.account.resolve()
        step = next((step for step in reversed(self.account.steps) if step.kind == TIMED), None)
        seconds = {} if step is None else {**step.phases, "step": step.seconds}
        return {f"phase/{phase}_s": value for phase, value in seconds.items()}

    def phases(self, *, ended: bool, command: str = "") -> Phases:
        """`ended`: as the training meant to. Its other life is then timed, and its processes are compared."""
        watched = Watched(
            account=self.account,
            calls=self.hooks.captured,
            roots=self.hooks.roots,
            optimizers=self.hooks.optimizers,
            device=device(self.hooks.roots),
            ranks=self.ranks,
            over=between(self.before, self.after),
            flops=self.flops,
            memory=self.memory,
            sampling=self.sampling,
            fixed=bool(command),
            lead=self.asked,
        )
        return phases_of(watched, ended=ended, command=command)

    def _between_runs(self, kind: str) -> None:
        if self.account.count == 1 and not self.hooks.roots:
            self.account.resolve()  # by the clock that its marks are of
            for root in trained_by(self.hooks.optimizers):
                self.hooks.watch_module(root)
            self.account.clock = self.clock or device_of(device(self.hooks.roots))
        if self.ranks is ALONE and (ranks := Ranks.known()) is not ALONE:
            self.ranks = ranks
            self.hooks.watch_collectives()
        self.hooks.run_ended()
        self.hooks.run_begins()
        self.counting.close()
        if kind == COUNTED and not compiled(self.hooks.roots):
            flops = self.counting.enter_context(StepFlops(self._phase))
            memory = self.counting.enter_context(StepMemory(self._phase, device(self.hooks.roots), self._held()))
            self.flops, self.memory = flops.flops, memory.peaks

    def _phase(self) -> str:
        return LOSS if self.account.phase == AFTER_FORWARD else self.account.phase

    def _held(self) -> Iterator[object]:
        """Tensors that are there before a step begins."""
        for root in self.hooks.roots:
            yield from root.buffers()
            for weight in root.parameters():
                yield from (weight, weight.grad)
        for optimizer in self.hooks.optimizers:
            yield from optimizer_state(optimizer)


def device(roots: Iterable[nn.Module]) -> torch.device:
    """That the weights are on."""
    first = next((weight for root in roots for weight in root.parameters()), None)
    return torch.device("cpu") if first is None else first.device


class Watching:
    """What the callbacks of both Trainers share: a measurement while one of their trainings runs."""

    def __init__(
        self,
        *,
        every: int = 4,
        warmup: int = 3,
        flops: bool = True,
        results: str | Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self.sampling = Sampling(every=every, warmup=warmup, count_flops=flops)
        self.results, self.clock = results, clock
        self.measurement: Measurement | None = None
        self.phases: Phases | None = None
        self.prepare()

    def prepare(self) -> None:
        """Before the trainer enters its loop."""

    def begin(self, roots: Iterable[nn.Module]) -> Hooks:
        self.measurement = Measurement(self.sampling, clock=self.clock)
        return self.measurement.start(roots)

    def end(self, directory: Path, *, ended: bool) -> None:
        """Appends the rows to `results`, or to `phase_costs/results.jsonl` in the training's own `directory`."""
        measurement, self.measurement = self.measurement, None
        if measurement is not None:
            self.phases = measurement.finish(Path(self.results or directory / "phase_costs/results.jsonl"), ended=ended)
