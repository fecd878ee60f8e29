"""Of a machine that anybody may be using, only what no load can change: which operators run, and what a file holds."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from experiments import calibrate as question
from isoforward.app.command_line import run
from isoforward.base import datasheets
from isoforward.base.datasheets import TABLE, Hardware, calibrated_here, kept_here, lookup, save
from isoforward.base.disturbance import Disturbance
from isoforward.base.errors import BadInput
from isoforward.base.hardware import cpu_model, processors
from isoforward.measure.operators import Operator
from isoforward.measure.trust import Findings
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
    recorder = runs_of(case)[2]()
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


def test_operators_are_parts_of_one_work_and_a_sample_holds_several_executions() -> None:
    case = dataclasses.replace(sample(("gpt2", 32, 16, 1, 1, 16, "fp32", 8)), threads=1)
    work, places, recorder = calibration.operators_in_place(runs_of(case)[2])
    took = work.run(2)
    assert len(took) == len(places) == sum(len(recorder.took_s[phase]) for phase in calibration.TOLD)
    assert min(took) > 0
    assert {phase for phase, _ in places.values()} == set(calibration.TOLD)


def told(**more: Any) -> Findings:
    quiet: dict[str, Any] = {"times": 1, "imprecise": (), "samples": 100, "retaken": 0, "disturbed": 0, "drift": None}
    quiet |= {"disturbance": Disturbance(elapsed_s=60.0), "busiest": ("", 0.0), "stopped": False}
    return Findings(**quiet | more)


def test_only_what_nothing_disturbed_is_kept_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = made_here("this")
    content: dict[str, Any] = {"id": "abc", "reading": [[1, 1.0]], "copying_bytes_per_s": 1.0, "operators": {}}
    fits = {phase: {"dispatch_s": 1e-6, "scale": 1.0} for phase in calibration.TOLD}
    content |= {"all_reduce": None, "beyond": fits, "identity": made.calibration["identity"]}
    made = dataclasses.replace(made, calibration=content)
    crowd = Disturbance(elapsed_s=60.0, others_s=50.0)
    for n, (found, code) in enumerate([(told(disturbance=crowd, busiest=("yes", 49.0)), 2), (told(), 0)]):
        monkeypatch.setattr(question, "calibrate", lambda say, found=found: (made, [told(), found]))
        directory = tmp_path / str(n)
        assert run(question.main, question.Calibrate, ["tracking=none", f"run_dir={directory}"]) == code
        assert (directory / "hardware.json").is_file()
        assert (calibrated_here() is not None) == (code == 0)
    error = capsys.readouterr().err
    assert "not kept for hardware=here: other processes (mostly yes) used" in error


@pytest.mark.slow
def test_a_calibration_survives_its_file_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLES", calibration.SAMPLES[:6])
    hardware, found = calibration.calibrate()
    assert sum(one.samples for one in found) > 0
    save(tmp_path / "this.json", hardware)
    again = datasheets.load(tmp_path / "this.json")
    assert json.dumps(again.calibration) == json.dumps(hardware.calibration)
    assert again.peak_flops_per_s["fp32"] > 1e8
