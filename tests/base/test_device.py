"""A third kind of device is one class; the two that there are say what they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isoforward.base import choices, hardware
from isoforward.base import device as module
from isoforward.base.config import TrainConfig, TrainerConfig
from isoforward.base.datasheets import TABLE, Hardware
from isoforward.base.device import KINDS, CpuDevice, CudaDevice, Device, best_device, device_of
from isoforward.base.errors import BadInput
from isoforward.base.memory_readers import Unmeasured
from isoforward.base.stopwatch import Stopwatch, spent
from isoforward.base.vocabulary import Condition
from isoforward.measure.memory_ledger import inference_ledger
from isoforward.model.gpt import GPT
from isoforward.train.distributed import refuse_what_cannot_be_shared
from tests.conftest import tiny

GPT2 = [(12, 2048, 2304, 768), (1, 2048, 50257, 768)]  # products of a model: how many, rows, out, in


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Device]]:
    """A whole kind of device: tensors without data, on a clock of its own."""
    monkeypatch.setattr(module, "KINDS", dict(KINDS))
    module._device.cache_clear()

    class Meta(Device):
        kind = "meta"
        allocation_bytes = 2**20
        memory = Unmeasured()

        @classmethod
        def available(cls) -> bool:
            return True

        now = 0

        def mark(self) -> int:
            Meta.now += 1
            return Meta.now

        def seconds(self, start: int, end: int) -> float:
            return 1.0 * (end - start)

        def settle(self) -> None: ...

        @property
        def name(self) -> str:
            return "Planted Accelerator"

        def peaks(self) -> Hardware:
            return TABLE["h100"]

        def multiplies_bf16(self) -> bool:
            return False

        def count(self) -> int:
            return 3

        def identity(self) -> dict[str, Condition]:
            return {"gpu": self.name, "cuda": None}

        def total_bytes(self) -> int:
            return 2**30

        def free_bytes(self) -> int:
            return 2**29

    yield Meta
    module._device.cache_clear()


def test_a_third_device_is_one_class(third: type[Device]) -> None:
    device = device_of("meta")
    assert type(device) is third and device is device_of(torch.device("meta"))
    assert best_device() is best_device("gpu") is device
    assert type(best_device("cpu")) is CpuDevice
    assert device.quicker_precision([(1, 8, 8, 8)]) == ("fp32", "meta has no bf16 instructions here")


def test_phases_are_timed_on_the_third_devices_own_clock(third: type[Device]) -> None:
    clock = device_of(torch.device("meta"))
    stopwatch = Stopwatch(clock)
    with stopwatch.step(), stopwatch("forward"):
        clock.mark()
    assert stopwatch.laps() == [{"forward": 2.0, "residual": 2.0, "step": 4.0}]
    assert spent(clock, lambda: None) == 1.0


def test_its_memory_is_handed_out_in_its_own_pieces(third: type[Device]) -> None:
    with torch.device("meta"):
        model, tokens = GPT(tiny()).requires_grad_(False), torch.zeros(2, 8, dtype=torch.long)
    ledger = inference_ledger(model, tokens, None, new_tokens=0)
    assert ledger.peak_bytes > 0
    assert all(size % 2**20 == 0 for size in ledger.categories.values())


def test_no_more_of_them_are_used_than_there_are(third: type[Device]) -> None:
    with pytest.raises(BadInput, match=r"trainer\.devices=4: 3 meta devices are here"):
        refuse_what_cannot_be_shared(TrainConfig(trainer=TrainerConfig(devices=4)))


def test_a_kind_that_nobody_wrote_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="device mps is not one that this measures on: choose one of cpu, cuda"):
        device_of("mps")


def test_the_processor_has_memory_and_shares_it_with_any_number_of_processes() -> None:
    cpu = device_of("cpu")
    free, total = cpu.free_bytes(), cpu.total_bytes()
    assert free is not None and total is not None
    assert 0 < free <= total
    assert cpu.count() is None
    assert spent(cpu, lambda: None) >= 0


@pytest.mark.parametrize(
    ("capable", "bf16_s", "precision", "why"),
    [
        (False, 0.001, "fp32", "no bf16 instructions"),
        (True, 0.004, "fp32", "2.00 x the time"),
        (True, 0.00195, "fp32", "0.97 x the time"),
        (True, 0.00182, "fp32", "0.91 x the time"),
        (True, 0.0005, "bf16", "0.25 x the time"),
    ],
)
def test_bf16_is_chosen_only_where_the_machine_has_it_and_it_proves_faster(
    quiet: None, monkeypatch: pytest.MonkeyPatch, capable: bool, bf16_s: float, precision: str, why: str
) -> None:
    planted = {"fp32": lambda: 0.002, "bf16": lambda: bf16_s}
    monkeypatch.setattr(CpuDevice, "timed_precisions", lambda device, products: planted)
    monkeypatch.setattr(CpuDevice, "multiplies_bf16", lambda device: capable)
    chosen, reason = CpuDevice(torch.device("cpu")).quicker_precision(GPT2)
    assert chosen == precision
    assert why in reason


def test_a_precision_is_decided_once_and_kept(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five starts of one command on one busy machine found bf16 to take 1.77 to 0.90 of fp32's time."""
    found = []
    for bf16_s in (0.5, 1.77, 1.26, 1.06, 0.95):
        planted = {"fp32": lambda: 1.0, "bf16": lambda took_s=bf16_s: took_s}
        monkeypatch.setattr(CpuDevice, "timed_precisions", lambda device, products, planted=planted: planted)
        monkeypatch.setattr(CpuDevice, "multiplies_bf16", lambda device: True)
        monkeypatch.setattr(choices, "_measuring", choices.Measuring())  # as a new process begins
        found.append(CpuDevice(torch.device("cpu")).quicker_precision(GPT2))
    assert set(found) == {("bf16", "the model's products in bf16 take 0.50 x the time of fp32 here")}


def test_of_a_huge_product_a_part_is_tried() -> None:
    ways = device_of("cpu").timed_precisions([(12, 64, 96, 32), (1, 10**9, 1, 2**20)])
    assert all(way() > 0 for way in ways.values())


@pytest.mark.parametrize(
    ("cpuinfo", "capable"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f amx_bf16\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("", False),
    ],
)
def test_bf16_instructions_are_read_from_the_processors_flags(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, capable: bool
) -> None:
    monkeypatch.setattr(hardware, "read_text", lambda path: cpuinfo)
    assert device_of("cpu").multiplies_bf16() is capable


def test_choosing_a_precision_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    assert all(way() > 0 for way in device_of("cpu").timed_precisions([(1, 4, 8, 8)]).values())
    assert torch.equal(torch.get_rng_state(), before)


def test_compile_without_a_compiler_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from isoforward.base.device import device_of; device_of('cpu').refuse_without_compiler()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CXX": "/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "BadInput: compile=true needs a C++ compiler, and CXX=/none does not run here" in done.stderr


@pytest.mark.gpu
def test_a_gpu_says_what_it_is() -> None:
    gpu = best_device("gpu")
    assert type(gpu) is CudaDevice
    assert gpu.identity()["gpu"] == gpu.name == torch.cuda.get_device_name()
    assert 0 < gpu.free_bytes() < gpu.total_bytes()
    assert gpu.count() == torch.cuda.device_count()
    gpu.memory.reset()
    held = torch.ones(2**20, device=gpu.where)
    assert gpu.memory.peak() >= gpu.memory.now() >= held.nbytes
    assert spent(gpu, lambda: held @ held) > 0
    assert gpu.quicker_precision(GPT2)[0] in ("fp32", "bf16")
