"""Planted counters: what they count comes out divided, named and with idle power off; what they cannot tell is said."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from isoforward.base.errors import BadInput
from isoforward.measure import energy
from isoforward.measure.energy import Estimated, Measured, Unavailable, measure_idle, open_reader

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Planted:
    """Says what it is told to."""

    counted = "a planted device"

    def __init__(self, *joules: float) -> None:
        self.readings = iter(joules)

    def start(self) -> None:
        self.started = True

    def stop(self) -> float:
        assert self.started
        return next(self.readings)


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A planted ZeusMonitor: fill `cpus` and `reading`, look at `asked`."""
    planted = SimpleNamespace(cpus=[0], asked={}, reading=None)

    class ZeusMonitor:
        def __init__(self, gpu_indices: list[int], cpu_indices: list[int] | None) -> None:
            planted.asked = {"gpus": gpu_indices, "cpus": cpu_indices}
            self.cpu_indices = planted.cpus if cpu_indices is None else cpu_indices

        def begin_window(self, key: str, restart: bool) -> None:
            self.key = key

        def end_window(self, key: str) -> SimpleNamespace:
            assert key == self.key
            reading: SimpleNamespace = planted.reading
            return reading

    module = ModuleType("zeus.monitor")
    module.ZeusMonitor = ZeusMonitor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    monkeypatch.setattr(energy, "WINDOW_S", 0.0)
    monkeypatch.setattr(energy, "measure_idle", lambda counter: 10.0)
    return planted


def test_a_window_runs_short_work_until_it_is_long_enough_and_gives_the_joules_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter((0.0, 0.4, 0.8, 1.2))
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter=times.__next__))
    runs = []
    reading = Measured(Planted(600.0), clock=iter((0.0, 1.2)).__next__).window(lambda: runs.append(1), window_s=1.0)
    assert len(runs) == 3
    assert reading.energy_j == pytest.approx(200.0)
    assert reading.provenance == "measured"


def test_work_longer_than_the_window_runs_once() -> None:
    runs: list[int] = []
    Estimated(10.0).window(lambda: runs.append(1), window_s=0.0)
    assert runs == [1]


def test_idle_power_is_taken_off_and_said_so() -> None:
    reader = Measured(Planted(100.0), idle_w=30.0, clock=iter((0.0, 2.0)).__next__)
    reader.start()
    reading = reader.stop()
    assert reading.energy_j == pytest.approx(100.0 - 30.0 * 2.0)
    assert "idle power of 30.0 W taken off" in reading.reason
    assert "a planted device" in reading.reason


def test_idle_power_that_is_not_known_is_said_to_be_included() -> None:
    reader = Measured(Planted(100.0), clock=iter((0.0, 2.0)).__next__)
    reader.start()
    reading = reader.stop()
    assert reading.energy_j == 100.0
    assert "idle power included" in reading.reason


@pytest.mark.parametrize(
    ("joules", "elapsed_s", "idle_w", "why"),
    [
        (5.0, 0.03, None, "30 ms is shorter"),
        (0.0, 2.0, None, "0.0 J"),
        (-7.0, 2.0, None, "-7.0 J"),
        (math.nan, 2.0, None, "nan J"),
        (50.0, 2.0, 30.0, "no more than its idle 30.0 W"),
    ],
)
def test_what_a_counter_cannot_tell_is_unavailable_with_the_reason(
    joules: float, elapsed_s: float, idle_w: float | None, why: str
) -> None:
    reader = Measured(Planted(joules), idle_w=idle_w, clock=iter((0.0, elapsed_s)).__next__)
    reader.start()
    reading = reader.stop()
    assert (reading.energy_j, reading.provenance) == (None, "unavailable")
    assert why in reading.reason


def test_idle_power_is_the_joules_of_sleep_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((5.0, 9.0))
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter=times.__next__, sleep=lambda seconds: None))
    assert measure_idle(Planted(100.0)) == pytest.approx(25.0)


def test_a_wattage_is_an_estimate_of_watts_times_seconds() -> None:
    reader = Estimated(65.0, clock=iter((1.0, 3.0)).__next__)
    reader.start()
    reading = reader.stop()
    assert (reading.energy_j, reading.provenance) == (130.0, "estimated")
    assert "65 W" in reading.reason


@pytest.mark.parametrize("setting", ["65W", "65", "6.5e1W"])
def test_a_wattage_is_used_only_because_it_was_asked_for(setting: str) -> None:
    reader = open_reader(setting, CPU)
    assert isinstance(reader, Estimated)
    assert reader.watts == 65.0


@pytest.mark.parametrize("setting", ["", "W", "0W", "-5W", "nanW", "infW", "much"])
def test_a_setting_that_is_no_wattage_is_refused(setting: str) -> None:
    with pytest.raises(BadInput, match=r"measure\.energy"):
        open_reader(setting, CPU)


def test_without_zeus_energy_is_unavailable_and_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    reading = open_reader("auto", CPU).window(lambda: pytest.fail("nobody learns from this run"))
    assert (reading.energy_j, reading.provenance) == (None, "unavailable")
    assert "pip install 'isoforward[energy]'" in reading.reason


def test_a_driver_that_fails_costs_the_joules_and_not_the_run(
    zeus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("NVML: driver not loaded\nlong story")

    monkeypatch.setattr(sys.modules["zeus.monitor"], "ZeusMonitor", broken)
    reader = open_reader("auto", GPU)
    assert isinstance(reader, Unavailable)
    assert reader.stop().reason == "no energy counter can be read: RuntimeError: NVML: driver not loaded"


def test_a_processor_without_readable_counters_is_unavailable(zeus: SimpleNamespace) -> None:
    zeus.cpus = []
    assert "RAPL" in open_reader("auto", CPU).stop().reason


def measured(reader: energy.EnergyReader, elapsed_s: float) -> energy.Energy:
    assert isinstance(reader, Measured)
    reader.clock = iter((0.0, elapsed_s)).__next__
    reader.start()
    return reader.stop()


def test_on_a_gpu_only_that_gpu_is_counted(zeus: SimpleNamespace) -> None:
    zeus.reading = SimpleNamespace(gpu_energy={1: 500.0}, cpu_energy=None, dram_energy=None)
    reading = measured(open_reader("auto", GPU), 2.0)
    assert zeus.asked == {"gpus": [1], "cpus": []}
    assert reading.energy_j == pytest.approx(500.0 - 10.0 * 2.0)
    assert "GPU 1" in reading.reason


def test_on_a_processor_its_packages_and_their_memory_are_counted(zeus: SimpleNamespace) -> None:
    zeus.reading = SimpleNamespace(gpu_energy={}, cpu_energy={0: 40.0, 1: 50.0}, dram_energy={0: 3.0})
    reading = measured(open_reader("auto", CPU), 1.0)
    assert zeus.asked == {"gpus": [], "cpus": None}
    assert reading.energy_j == pytest.approx(93.0 - 10.0)


@pytest.mark.gpu
def test_a_real_gpu_draws_a_believable_power_above_idle() -> None:
    pytest.importorskip("zeus")
    device = torch.device("cuda", 0)
    matrix = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    reader = open_reader("auto", device)
    assert isinstance(reader, Measured)
    assert reader.idle_w is not None
    assert 5 < reader.idle_w < 300
    reader.start()
    started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    started.record()
    for _ in range(20_000):
        matrix @ matrix
    ended.record()
    reading = reader.stop()
    assert reading.energy_j is not None
    assert 20 < reading.energy_j / (started.elapsed_time(ended) * 1e-3) < 1500
