"""Which of several ways is the fastest on this machine: measured once, in interleaved pairs, and kept.

The first way is PyTorch's plain one: a close call is for it, and so is one that other programs disturbed, which is not
kept either. What is kept belongs to this processor, this build of torch and this number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from isoforward.base.caches import cache_directory
from isoforward.base.checks import one_of
from isoforward.base.config import KERNELS, KERNELS_VARIABLE
from isoforward.base.disturbance import between, look
from isoforward.base.errors import StorageFailed
from isoforward.base.hardware import cpu_model
from isoforward.base.locks import locked
from isoforward.base.storage import write_text

FORMAT = 1  # of what is kept: raised where the ways themselves change
CLOSE = 0.9  # of the plain way's time: what takes more is no reason to leave it
ROUNDS = 7  # undisturbed ones that are enough
DISTURBED_ROUNDS = 3  # in a row, after which this process measures no more
BUDGET_S = 2.0  # of one process, for all that it chooses

Way = Callable[[], float]  # runs once and gives the seconds that it took


@dataclass(frozen=True, kw_only=True)
class Choice:
    chosen: str
    ratios: dict[str, float]  # median time of each other way, of the first one's; empty where nothing was measured
    why: str = ""  # nothing was measured


class Measuring:
    """What this process has measured, and what it may still spend."""

    def __init__(self) -> None:
        self.known: dict[str, Choice] = {}
        self.left_s = BUDGET_S
        self.busy = False

    @property
    def over(self) -> str:
        """Why no more is measured; empty while it is."""
        if self.busy:
            return "other programs kept the processors busy"
        return "no time was left to measure" if self.left_s <= 0 else ""


_measuring = Measuring()


def is_reference() -> bool:
    """Whether the plain ways alone are wanted, in this process and those that it starts."""
    asked = os.environ.get(KERNELS_VARIABLE, "auto")
    one_of(KERNELS_VARIABLE, asked, KERNELS)
    return asked == "reference"


def fastest(question: str, of: Mapping[str, object], plain: str, ways: Callable[[], Mapping[str, Way]]) -> Choice:
    """Of `ways`, `plain` among them, which are built only where they are measured. `of` is all that the answer depends
    on, beside the machine, as JSON has it.
    """
    if is_reference():
        return Choice(chosen=plain, ratios={}, why="kernels=reference")
    identity = {
        "format": FORMAT,
        "question": question,
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **of,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    if digest not in _measuring.known:
        _measuring.known[digest] = _kept_or_measured(f"{question}-{digest}.json", identity, plain, ways)
    return _measuring.known[digest]


def _kept_or_measured(
    name: str, identity: Mapping[str, object], plain: str, ways: Callable[[], Mapping[str, Way]]
) -> Choice:
    with ExitStack() as stack:
        place = None
        with suppress(StorageFailed):
            place = cache_directory("kernels", name)
        if (kept := _kept(place)) is not None:
            return kept
        if place is not None and not _measuring.over:
            with suppress(StorageFailed):  # processes that start together would disturb each other
                stack.enter_context(locked(place.with_name(".lock"), wait=True))
            if (kept := _kept(place)) is not None:
                return kept
        if _measuring.over:
            return Choice(chosen=plain, ratios={}, why=_measuring.over)
        found = measured(ways, plain)
        if found.ratios and place is not None:
            with suppress(StorageFailed):  # measured again next time
                write_text(place, json.dumps({"of": identity, **asdict(found)}, indent=2))
        return found


def _kept(place: Path | None) -> Choice | None:
    """None where nothing is kept or it cannot be read: it is measured again."""
    if place is not None:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(place.read_text())
            ratios = {str(way): float(ratio) for way, ratio in found["ratios"].items()}
            return Choice(chosen=str(found["chosen"]), ratios=ratios)
    return None


def is_busy() -> bool:
    """Whether a few products on all threads had to wait for others: quickly told, before anything large is built."""
    matrix = torch.ones(512, 512)
    before = look()
    for _ in range(4):
        torch.mm(matrix, matrix)
    return between(before, look()).disturbed


def measured(build: Callable[[], Mapping[str, Way]], plain: str) -> Choice:
    """Every way in turns, until enough rounds were undisturbed or the budget is spent."""
    started = time.perf_counter()
    _measuring.busy = all(is_busy() for _ in range(DISTURBED_ROUNDS))
    if _measuring.busy:
        return Choice(chosen=plain, ratios={}, why=_measuring.over)
    ways = build()
    rounds: list[dict[str, float]] = []
    disturbed = 0
    for way in ways.values():
        way()  # the libraries' set-up
    while len(rounds) < ROUNDS and disturbed < DISTURBED_ROUNDS:
        if time.perf_counter() - started > _measuring.left_s:
            break
        before = look()
        order = list(ways) if len(rounds) % 2 else list(ways)[::-1]
        times_s = {way: ways[way]() for way in order}
        if between(before, look()).disturbed:
            disturbed += 1
        else:
            disturbed = 0
            rounds.append(times_s)
    _measuring.left_s -= time.perf_counter() - started
    if len(rounds) < ROUNDS:
        _measuring.busy = disturbed == DISTURBED_ROUNDS
        return Choice(chosen=plain, ratios={}, why=_measuring.over)
    ratios = {way: statistics.median(each[way] / each[plain] for each in rounds) for way in ways if way != plain}
    quickest = min(ratios, key=ratios.__getitem__, default=plain)
    return Choice(chosen=quickest if ratios.get(quickest, 1.0) < CLOSE else plain, ratios=ratios)
