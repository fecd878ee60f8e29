"""Joules of a piece of work: measured by a device's own counters, estimated from a wattage, or unavailable and why.

Counters refresh every 100 ms or so: short work is repeated inside one window, and a window too short to be told from
their steps is unavailable rather than 0.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from isoforward.base.device import device_of
from isoforward.base.errors import BadInput

if TYPE_CHECKING:
    import torch

REFRESH_S = 0.1
WINDOW_S = 10 * REFRESH_S  # one refresh more or less is a tenth of it


@dataclass(frozen=True, kw_only=True)
class Energy:
    """`energy_j` is None exactly where `provenance` is unavailable, and `reason` then says why.

    Else `reason` says what was counted: of which device, idle power taken off or not.
    """

    energy_j: float | None
    provenance: str  # measured | estimated | unavailable
    reason: str


class Counter(Protocol):
    """Joules of one device. Both wait for the device to finish what it was given."""

    counted: str  # what is counted: GPU 0, CPU packages, ...

    def start(self) -> None: ...
    def stop(self) -> float: ...


class EnergyReader(ABC):
    """Chosen once by `open_reader`; who uses it need not know which."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> Energy:
        """Of what ran since `start`."""

    def window(self, work: Callable[[], object], *, window_s: float = WINDOW_S) -> Energy:
        """Of one `work`, which runs again and again until `window_s` have passed."""
        runs = 0
        self.start()
        until_s = time.perf_counter() + window_s
        while not runs or time.perf_counter() < until_s:
            work()
            runs += 1
        energy = self.stop()
        return energy if energy.energy_j is None else replace(energy, energy_j=energy.energy_j / runs)


class Unavailable(EnergyReader):
    """Runs nothing that nobody will learn from."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def start(self) -> None:
        pass

    def stop(self) -> Energy:
        return Energy(energy_j=None, provenance="unavailable", reason=self.reason)

    def window(self, work: Callable[[], object], *, window_s: float = WINDOW_S) -> Energy:
        return self.stop()


class Estimated(EnergyReader):
    """A wattage that the user vouches for, times the time."""

    def __init__(self, watts: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.watts, self.clock = watts, clock

    def start(self) -> None:
        self.started_s = self.clock()

    def stop(self) -> Energy:
        energy_j = self.watts * (self.clock() - self.started_s)
        return Energy(energy_j=energy_j, provenance="estimated", reason=f"a constant {self.watts:g} W, as asked")


class Measured(EnergyReader):
    """`idle_w` is taken off where it is known; `measure_idle` finds it out."""

    def __init__(
        self, counter: Counter, *, idle_w: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.counter, self.idle_w, self.clock = counter, idle_w, clock

    def start(self) -> None:
        self.counter.start()
        self.started_s = self.clock()

    def stop(self) -> Energy:
        joules = self.counter.stop()
        elapsed_s = self.clock() - self.started_s
        counted = self.counter.counted
        if elapsed_s < REFRESH_S:
            return _nothing(
                f"{elapsed_s * 1e3:.0f} ms is shorter than the {REFRESH_S * 1e3:.0f} ms counters refresh in"
            )
        if not math.isfinite(joules) or joules <= 0:
            return _nothing(f"the counter of {counted} went from one reading to the next by {joules} J")
        if self.idle_w is None:
            return Energy(energy_j=joules, provenance="measured", reason=f"{counted}, idle power included")
        above_j = joules - self.idle_w * elapsed_s
        if above_j <= 0:
            return _nothing(f"{counted} drew no more than its idle {self.idle_w:.1f} W")
        return Energy(
            energy_j=above_j, provenance="measured", reason=f"{counted}, idle power of {self.idle_w:.1f} W taken off"
        )


def measure_idle(counter: Counter, *, window_s: float = WINDOW_S) -> float:
    """Watts while this process sleeps."""
    counter.start()
    started_s = time.perf_counter()
    time.sleep(window_s)
    return counter.stop() / (time.perf_counter() - started_s)


def open_reader(setting: str, device: torch.device) -> EnergyReader:
    """`auto` measures where it can; a wattage such as 65W is an estimate, and only made where it is asked for."""
    if setting != "auto":
        try:
            watts = float(setting.removesuffix("W"))
        except ValueError:
            watts = math.nan
        if not 0 < watts < math.inf:
            raise BadInput(f"measure.energy={setting} must be auto or a wattage such as 65W")
        return Estimated(watts)
    try:
        counter = ZeusCounter(device)
        return Measured(counter, idle_w=measure_idle(counter))
    except ImportError:
        return Unavailable(
            "zeus is not installed: pip install 'isoforward[energy]', or estimate with measure.energy=65W"
        )
    except Exception as error:  # drivers fail in their own ways, and none may end a run that only lacks its joules
        return Unavailable(f"no energy counter can be read: {type(error).__name__}: {error}".splitlines()[0][:200])


class ZeusCounter:
    """An NVIDIA GPU's own counter through NVML, or, on the CPU, RAPL's of its packages and memory."""

    def __init__(self, device: torch.device) -> None:
        from zeus.monitor import ZeusMonitor

        gpus = device_of(device).gpus_with_energy_counters()
        self.monitor = ZeusMonitor(gpu_indices=gpus, cpu_indices=[] if gpus else None)
        if not gpus and not self.monitor.cpu_indices:
            raise LookupError("RAPL is not there or not readable, which takes root or the zeusd service")
        self.counted = f"GPU {gpus[0]}" if gpus else "CPU packages and memory"

    def start(self) -> None:
        self.monitor.begin_window("isoforward", restart=True)

    def stop(self) -> float:
        read = self.monitor.end_window("isoforward")
        parts = (read.gpu_energy, read.cpu_energy, read.dram_energy)
        return math.fsum(joules for part in parts for joules in (part or {}).values())


def _nothing(reason: str) -> Energy:
    return Energy(energy_j=None, provenance="unavailable", reason=reason)
