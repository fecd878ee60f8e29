"""Two reference kernels that run beside everything that is timed: a matrix product and a plain read of memory.

Their change over a run is the machine's drift; their best is the roofline that the run is held against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from isoforward.base.datasheets import lookup
from isoforward.base.device import device_of
from isoforward.base.results import Row, RowFields
from isoforward.base.vocabulary import Condition
from isoforward.measure.benchmark import Part, Work, timed
from isoforward.measure.case import Case
from isoforward.serve.inference import DTYPES

SIZES = {"cpu": (1024, 2**27)}  # side of the square matrices: about 10 ms on two cores; bytes read: beyond any cache
LARGE = (8192, 2**30)

PRODUCT, READ = "matrix product", "memory read"


def reference_works(case: Case) -> list[Work]:
    """Draws no random number."""
    dtype, (side, size) = DTYPES[case.precision], SIZES.get(case.device, LARGE)
    matrix = torch.full((side, side), 1 / 64, dtype=dtype, device=case.device)
    numbers = torch.ones(size // 4, dtype=torch.float32, device=case.device)
    product = torch.empty_like(matrix)

    def part(kernel: str, **more: Condition) -> Part:
        conditions: dict[str, Condition] = {"kernel": kernel, "dtype": case.precision, **more}
        return Part(life="training", phase="run", per="run", conditions=conditions)

    return [
        timed(case.clock, part(PRODUCT, shape=f"{side} x {side}"), lambda: torch.mm(matrix, matrix, out=product)),
        timed(case.clock, part(READ, bytes=size), numbers.sum),
    ]


def peak_rows(case: Case, references: Mapping[Part, Sequence[float]]) -> Iterator[Row]:
    """What the device can do at most: as calibrated or by its data sheet where that is known, else as seen here.

    Interference only slows, so that the fastest sample is nearest to the peak.
    """
    about: RowFields = {"life": "training", "phase": "run", "per": "run"}
    hardware = device_of(case.device).peaks() if case.hardware == "here" else lookup(case.hardware)
    if hardware is not None and case.precision in hardware.peak_flops_per_s:
        conditions = {"hardware": hardware.name, "source": hardware.source, "dtype": case.precision}
        at: RowFields = {**about, "provenance": "estimated", "conditions": conditions}
        yield case.row(at, quantity="peak_flops", value=hardware.peak_flops_per_s[case.precision])
        yield case.row(at, quantity="peak_bandwidth", value=hardware.bandwidth_bytes_per_s)
        return
    if case.hardware != "here":
        return
    for part, samples in references.items():
        if not samples:
            continue
        conditions = {"source": f"{part.conditions['kernel']} in this run", "dtype": case.precision}
        side, size = SIZES.get(case.device, LARGE)
        product = part.conditions["kernel"] == PRODUCT
        quantity, work = ("peak_flops", 2 * side**3) if product else ("peak_bandwidth", size)
        yield case.row(about, quantity=quantity, value=work / min(samples), conditions=conditions)
