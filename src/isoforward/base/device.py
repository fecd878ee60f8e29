"""Where tensors lie, and all that training, serving, measuring and planning ask of it: a class for each kind of device.

A further kind is one more subclass of Device. It is found by the name that torch gives to it; nothing else names it.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from isoforward.base import hardware
from isoforward.base.choices import Way, fastest
from isoforward.base.datasheets import Hardware, calibrated_here, recognise
from isoforward.base.errors import BadInput
from isoforward.base.memory_readers import CudaMemory, Memory, ProcessMemory
from isoforward.base.vocabulary import Condition

LARGEST = 2**26  # elements of a weight that a precision is tried on
PRODUCT = 2**29  # and multiplications of one product, where it has more than 64 rows

Mark = Any
Products = tuple[int, int, int, int]  # how many, and their rows, out and in
KINDS: dict[str, type[Device]] = {}  # by torch's name, the preferred one last


class Device(ABC):
    """One device, or the processors together. Marks are taken, never resolved, while the measured code runs."""

    kind: ClassVar[str]  # as torch names it
    allocation_bytes: ClassVar[int] = 1  # what memory is handed out in multiples of
    records_graphs: ClassVar[bool] = False  # a compiled step is replayed at fixed addresses
    compile_options: ClassVar[Mapping[str, Any]] = {}  # of torch.compile, for a step that decodes one token
    memory: ClassVar[Memory]  # what this process holds there

    def __init_subclass__(cls) -> None:
        KINDS[cls.kind] = cls

    def __init__(self, where: torch.device) -> None:
        self.where = where

    @classmethod
    @abstractmethod
    def available(cls) -> bool: ...

    # The clock

    @abstractmethod
    def mark(self) -> Mark:
        """This moment, in the order of the work that the device was given."""

    @abstractmethod
    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks, once `settle` has returned."""

    @abstractmethod
    def settle(self) -> None:
        """Waits until the device has done all that it was given."""

    # What it is

    @property
    @abstractmethod
    def name(self) -> str:
        """As its driver or the system calls it."""

    @abstractmethod
    def peaks(self) -> Hardware | None:
        """What it can do at most, by its data sheet or as it was calibrated here; None where neither is known."""

    @abstractmethod
    def multiplies_bf16(self) -> bool:
        """It has instructions for that."""

    def count(self) -> int | None:
        """How many of this kind are here; None where processes share one."""
        return None

    def identity(self) -> dict[str, Condition]:
        """What must be the same for two measurements to be compared."""
        return {"gpu": None, "cuda": None}

    def gpus_with_energy_counters(self) -> list[int]:
        """As NVML numbers them among those that are visible."""
        return []

    # Its memory

    @abstractmethod
    def total_bytes(self) -> int | None:
        """That this process can ever have; None where the system does not say."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """That something new can take; None where the system does not say."""

    # What torch.compile builds with, which it looks for only once the work has begun

    def missing_compiler(self) -> str | None:
        """What is not here, and how to get it."""
        return None

    def refuse_without_compiler(self) -> None:
        if missing := self.missing_compiler():
            raise BadInput(f"compile=true needs {missing}, or leave compile=true out")

    # What it is quick at

    def quicker_precision(self, products: Sequence[Products]) -> tuple[str, str]:
        """fp32 or bf16 for a model of these products, and why: bf16 where it has proved to be clearly faster."""
        if not self.multiplies_bf16():
            return "fp32", f"{self.kind} has no bf16 instructions here"
        of = {"device": self.name, **self.identity(), "products": [list(each) for each in products]}
        found = fastest("precision", of, "fp32", lambda: self.timed_precisions(products))
        if not found.ratios:
            return "fp32", f"bf16 was not tried: {found.why}"
        return found.chosen, f"the model's products in bf16 take {found.ratios['bf16']:.2f} x the time of fp32 here"

    def timed_precisions(self, products: Sequence[Products]) -> dict[str, Way]:
        """All of `products`, reckoned from one of each with fewer rows."""

        def way(dtype: torch.dtype) -> Way:
            drawn = []
            for count, rows, out, width in products:
                tried = min(out, max(1, LARGEST // width))
                few = min(rows, max(64, PRODUCT // (tried * width)))
                x, weight = (torch.full((n, width), 0.1, dtype=dtype, device=self.where) for n in (few, tried))
                drawn.append((count * rows * out / (few * tried), x, weight))

            @torch.inference_mode()
            def run() -> float:
                total_s = 0.0
                for share, x, weight in drawn:
                    start = time.perf_counter()
                    F.linear(x, weight)
                    self.settle()
                    total_s += share * (time.perf_counter() - start)
                return total_s

            return run

        return {"fp32": way(torch.float32), "bf16": way(torch.bfloat16)}


class CpuDevice(Device):
    kind = "cpu"
    # Fused into the product that reads it, an activation would be computed again for every row of the weight.
    compile_options: ClassVar[Mapping[str, object]] = {"options": {"realize_opcount_threshold": 0}}
    memory = ProcessMemory()

    @classmethod
    def available(cls) -> bool:
        return True

    def mark(self) -> int:
        return time.perf_counter_ns()

    def seconds(self, start: int, end: int) -> float:
        return (end - start) * 1e-9

    def settle(self) -> None:
        """Every operator has returned its result."""

    @property
    def name(self) -> str:
        return hardware.cpu_model()

    def peaks(self) -> Hardware | None:
        return calibrated_here()

    def multiplies_bf16(self) -> bool:
        return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(hardware.cpu_flags())

    def total_bytes(self) -> int | None:
        return hardware.memory_bytes()

    def free_bytes(self) -> int | None:
        return hardware.memory_available_bytes()

    def missing_compiler(self) -> str | None:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            asked = f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "g++ or clang++"
            return f"a C++ compiler, and {asked} does not run here: install one, name it in CXX"
        return None


class CudaDevice(Device):
    """Marks are events on the current stream: no synchronisation between phases, so that overlap stays what it is."""

    kind = "cuda"
    allocation_bytes = 512
    records_graphs = True
    compile_options: ClassVar[Mapping[str, object]] = {"mode": "reduce-overhead"}
    memory = CudaMemory()

    @classmethod
    def available(cls) -> bool:
        return torch.cuda.is_available()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def settle(self) -> None:
        torch.cuda.synchronize(self.where)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.where)

    def peaks(self) -> Hardware | None:
        return recognise(self.name)

    def multiplies_bf16(self) -> bool:
        return torch.version.hip is not None or torch.cuda.get_device_capability(self.where) >= (8, 0)

    def count(self) -> int:
        return torch.cuda.device_count()

    def identity(self) -> dict[str, Condition]:
        return {"gpu": self.name, "cuda": torch.version.cuda or torch.version.hip}

    def gpus_with_energy_counters(self) -> list[int]:
        return [self.where.index or 0]

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.where)[1]

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.where)[0]

    def missing_compiler(self) -> str | None:
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton on a GPU, which is not here: pip install triton"


def device_of(where: torch.device | str) -> Device:
    """The one object for where tensors lie."""
    return _device(torch.device(where))


@cache
def _device(where: torch.device) -> Device:
    if where.type not in KINDS:
        raise BadInput(f"device {where} is not one that this measures on: choose one of {', '.join(KINDS)}")
    return KINDS[where.type](where)


def best_device(accelerator: str = "auto") -> Device:
    """For `auto` the preferred one that is here, for `cpu` the processor, for `gpu` anything else."""
    here = [kind for kind, known in KINDS.items() if known.available() and (kind == "cpu") <= (accelerator != "gpu")]
    if not here:
        raise BadInput("trainer.accelerator=gpu: no CUDA device is here; write trainer.accelerator=cpu or auto")
    return device_of("cpu" if accelerator == "cpu" else here[-1])
