"""Of a machine that anybody may be using, only what no load can change: which operators run, and what a file holds."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from isoforward.base import datasheets
from isoforward.base.datasheets import TABLE, Hardware, calibrated_here, kept_here, lookup, save
from isoforward.base.errors import BadInput
from isoforward.base.hardware import cpu_model, processors
from isoforward.measure.operators import Operator
from isoforward.plan import calibration
from isoforward.plan.calibration import (
    REFERENCE,
    REFERRED,
    Seen,
    around,
    beyond,
    pace,
    points_of,
    runs_of,
    sample,
    usual,
)
from isoforward.plan.forecast import works_of


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def made_here(name: str, **identity: object) -> Hardware:
    ours = {"cpu": cpu_model(), "processors": len(processors())}
    return dataclasses.replace(TABLE["l4"], name=name, provenance="measured", calibration={"identity": ours | identity})


@pytest.mark.parametrize("shape", [("llama", 32, 16, 2, 2, 16, "fp32", 8), ("gpt2", 32, 16, 2, 2, 16, "bf16", 8)])
def test_the_operators_timed_in_place_are_those_that_a_forecast_asks_for(shape: calibration.Shape) -> None:
    case = dataclasses.replace(sample(shape), threads=1)
    recorder = runs_of(case)[1]()
    asked = works_of(case)
    for phase in ("forward", "loss", "backward", "prefill"):
        assert recorder.works()[phase] == asked[phase]
        assert recorder.took_s[phase].keys() == asked[phase].counts.keys()
        assert min(s for each in recorder.took_s[phase].values() for s in each) > 0


def test_an_operator_that_the_device_has_a_kernel_for_is_not_taken_apart() -> None:
    backward = works_of(sample(("llama", 32, 16, 1, 2, 16, "fp32", 8)))["backward"]
    kinds = {operator.kind for operator in backward.counts}
    assert "silu_backward float32" in kinds
    assert "sigmoid float32" not in kinds


def test_what_operators_take_adds_up_and_an_interruption_counts_little() -> None:
    assert usual([1.0, 2.0, 2.0, 3.0]) == 2
    assert usual([1.0, 1.0, 1.0, 1000.0]) < 2


def test_a_machine_at_half_its_pace_changes_no_operator() -> None:
    operator = Operator("mul.Tensor float32", (64,), 64)

    def seen(slower: float) -> Seen:
        took = dict.fromkeys(REFERRED, slower)
        case = sample(REFERENCE)
        return Seen(case=case, took_s=took, operators_s={"forward": {operator: slower}}, works={}, reference_s=took)

    both = [seen(1), seen(2)]
    points = points_of(both, [pace(each.reference_s, both[0].reference_s) for each in both])
    assert points["mul.Tensor float32"] == [[64, 1 / 64], [64, 1 / 64]]


def test_no_more_is_laid_to_dispatch_than_nothing() -> None:
    found = beyond([1.0, 2.0, 4.0], [1, 10, 400], [1.0, 1.9, 3.5])
    assert found.dispatch_s == 0
    assert 0.8 < found.scale < 1


def test_of_operators_in_their_place_dispatch_and_the_cost_of_timing_are_told_apart() -> None:
    in_place, dispatched, timed = [1.0, 2.0, 0.5], [100, 300, 90], [40, 70, 60]
    took = [s + 0.001 * n - 0.002 * m for s, n, m in zip(in_place, dispatched, timed, strict=True)]
    found = around(in_place, dispatched, timed, took)
    assert (found.scale, found.dispatch_s, found.timing_s) == (1, pytest.approx(0.001), pytest.approx(0.002))


def test_here_is_the_newest_calibration_of_this_machine() -> None:
    for n, hardware in enumerate([made_here("old"), made_here("new"), made_here("another's", cpu="Z80")]):
        path = kept_here() / f"{n}.json"
        save(path, hardware)
        os.utime(path, (1000 + n, 1000 + n))
    assert lookup("here").name == "new"


def test_here_without_a_calibration_says_how_to_make_one() -> None:
    assert calibrated_here() is None
    with pytest.raises(BadInput, match=r"hardware=here: .* python experiments/calibrate.py"):
        lookup("here")


@pytest.mark.slow
def test_a_calibration_survives_its_file_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ROUNDS", 1)
    monkeypatch.setattr(calibration, "SAMPLES", calibration.SAMPLES[:6])
    hardware = calibration.calibrate()
    save(tmp_path / "this.json", hardware)
    again = datasheets.load(tmp_path / "this.json")
    assert json.dumps(again.calibration) == json.dumps(hardware.calibration)
    assert again.peak_flops_per_s["fp32"] > 1e8
