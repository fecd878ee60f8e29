"""Peaks come from a file, a data sheet, or the fastest reference of the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import TABLE
from isoforward.measure import roofline
from isoforward.measure.case import Case
from isoforward.measure.roofline import peak_rows, reference_works

CASE = Case(experiment="phase_costs", model=ModelConfig(vocab=96))


def test_the_hardware_that_is_asked_for_gives_the_peaks_that_rates_are_held_against() -> None:
    rows = list(peak_rows(replace(CASE, hardware="t4"), {}))
    assert {row.quantity: row.value for row in rows} == {
        "peak_flops": TABLE["t4"].peak_flops_per_s["fp32"],
        "peak_bandwidth": TABLE["t4"].bandwidth_bytes_per_s,
    }
    assert {row.provenance for row in rows} == {"estimated"}


def test_the_fastest_sample_is_the_peak_where_nothing_is_known_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoforward.base.device.CpuDevice.peaks", lambda _: None)
    monkeypatch.setattr(roofline, "SIZES", {"cpu": (8, 64)})
    product, read = (work.part for work in reference_works(CASE))
    rows = list(peak_rows(CASE, {product: [0.5, 0.25, 0.75], read: [2.0, 4.0]}))
    assert {row.quantity: row.value for row in rows} == {"peak_flops": 2 * 8**3 / 0.25, "peak_bandwidth": 64 / 2.0}
    assert {row.provenance for row in rows} == {"measured"}
    assert list(peak_rows(CASE, {product: [], read: []})) == []


def test_a_precision_that_the_data_sheet_lacks_has_no_peak() -> None:
    assert list(peak_rows(replace(CASE, hardware="t4", precision="bf16"), {})) == []
