"""Planted costs come back; operators are counted by hand; peaks alone give a bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments.predict import Predict, main
from experiments.scaling import AXES, scaled, slopes
from isoforward.app.command_line import run
from isoforward.base.config import MeasureConfig, ModelConfig
from isoforward.base.datasheets import TABLE
from isoforward.base.errors import Integrity
from isoforward.base.results import read, select
from isoforward.base.statistics import summarise
from isoforward.measure.case import Case
from isoforward.measure.operators import Operator, Work
from isoforward.model import cost
from isoforward.plan.calibration import beyond
from isoforward.plan.forecast import HELD_OUT, Beyond, Calibrated, Curve, averaging_s, forecaster, predicted, works_of

SMALL = ModelConfig(layers=3, heads=2, width=32, vocab=96, context=32)
CASE = Case(experiment="forecast", model=SMALL, batch=2, length=16, measure=MeasureConfig(prompt=8, new_tokens=8))
LLAMA_70B = ModelConfig(
    family="llama", layers=80, heads=64, kv_heads=8, width=8192, ffn=28672, context=8192, vocab=128256, tied=False
)


def products(work: Work) -> int:
    return sum(count * one.work for one, count in work.counts.items() if one.kind.startswith(("product", "attention")))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_recorded_products_are_those_of_the_formulas(family: str) -> None:
    case = dataclasses.replace(CASE, model=dataclasses.replace(SMALL, family=family))
    works = works_of(case)
    assert products(works["forward"]) == cost.forward_flops(case.model, batch=2, length=16).total
    backward = cost.backward_flops(case.model, batch=2, length=16, convention="hardware")  # a fused attention's
    assert products(works["backward"]) == backward.total
    assert products(works["decode"]) == cost.decode_flops(case.model, batch=1, cached=12).total


def test_a_curve_gives_back_a_planted_law_between_its_points() -> None:
    points = np.array([[a, b] for a in range(4, 14, 2) for b in range(6, 14, 2)], dtype=float)
    curve = Curve(sizes=points, costs=-30 - 0.3 * points[:, 0] + 0.1 * points[:, 1])
    unit_s, inside = curve.at((2**7, 2**9))
    assert inside
    assert unit_s == pytest.approx(2 ** (-30 - 0.3 * 7 + 0.1 * 9), rel=0.02)


def test_beyond_the_calibrated_range_the_border_is_taken_and_it_is_said() -> None:
    curve = Curve(sizes=np.array([[4.0], [6.0], [8.0]]), costs=np.full(3, -30.0))
    unit_s, inside = curve.at((2**20,))
    assert not inside
    assert unit_s == pytest.approx(2**-30, rel=1e-6)


def test_a_phase_is_its_operators_and_what_each_of_them_costs_beside() -> None:
    kinds = {one.kind: len(one.size) for work in works_of(CASE).values() for one in work.counts}
    flat = {kind: [[1] * n + [1e-9], [2**24] * n + [1e-9]] for kind, n in kinds.items()}  # 1 ns a unit of work
    phases = ("forward", "loss", "backward", "optimizer", "prefill", "decode")
    fits = dict.fromkeys(phases, Beyond(scale=2, dispatch_s=1))
    times, warnings = Calibrated(operators=flat, reading=[[1, 1e18], [2, 1e18]], beyond=fits).times(CASE)
    forward = works_of(CASE)["forward"]
    work = sum(count * one.work for one, count in forward.counts.items())
    assert times["forward"] == pytest.approx(2 * 1e-9 * work + forward.dispatched, rel=1e-3)
    assert warnings == {}


def test_scale_and_dispatch_are_found_again_where_both_were_planted() -> None:
    alone, dispatched = [1.0, 0.01, 0.5], [100, 200, 400]
    took = [1.2 * a + 0.001 * n for a, n in zip(alone, dispatched, strict=True)]
    found = beyond(alone, dispatched, took)
    assert (found.scale, found.dispatch_s) == (pytest.approx(1.2), pytest.approx(0.001))


def test_a_model_larger_than_the_machine_is_bounded_by_peaks_and_told_not_to_fit() -> None:
    case = Case(experiment="predict", model=LLAMA_70B, batch=1, length=4096, precision="bf16")
    rows = list(predicted(TABLE["h100"], case))
    forward = next(row for row in rows if row.quantity == "time" and row.phase == "forward")
    assert forward.value == pytest.approx(cost.forward_flops(LLAMA_70B, batch=1, length=4096).total / 989.5e12)
    assert "not calibrated" in forward.warnings[0]
    optimizer = next(row for row in rows if row.quantity == "memory" and row.phase == "optimizer")
    assert optimizer.value is not None and optimizer.value >= 16 * 70e9
    assert "do not fit" in optimizer.warnings[0]
    assert {row.provenance for row in rows} == {"predicted"}


def test_a_rate_that_is_not_known_gives_no_time() -> None:
    case = dataclasses.replace(CASE, precision="bf16")
    rows = [row for row in predicted(TABLE["v100"], case) if row.quantity == "time"]
    assert {row.provenance for row in rows} == {"unavailable"}


def test_an_operator_that_was_never_measured_is_taken_at_the_bandwidth_and_counted_as_unknown() -> None:
    empty = Calibrated(operators={}, reading=[[1, 1e9], [2**40, 1e9]], beyond={})
    assert empty.operators_s(Work(counts={Operator("new float32", (500,), 500): 2}, dispatched=2), 1) == pytest.approx(
        (1e-6, 1e-6)
    )


def test_averaging_gradients_is_a_ring_and_three_passes_through_memory() -> None:
    made = {"all_reduce": {"latency_s": 0.5, "bytes_per_s": 10.0}, "copying_bytes_per_s": 30.0}
    assert averaging_s(made, 100, ways=2) == pytest.approx(0.5 + 100 / 10 + 600 / 30)  # 2 (n-1)/n of 100 bytes are sent
    assert averaging_s({"all_reduce": None}, 100, ways=2) is None


def test_a_calibration_that_is_none_is_refused() -> None:
    odd = dataclasses.replace(TABLE["h100"], calibration={"operators": {}})
    with pytest.raises(Integrity, match="is not one of ours"):
        forecaster(odd)


@pytest.mark.parametrize("power", [1, 2])
def test_the_exponent_of_a_planted_power_is_found_within_its_interval(power: int) -> None:
    draw = np.random.default_rng(0)
    points: list[tuple[int, Sequence[float]]] = [
        (size, list(size**power * draw.lognormal(sigma=0.05, size=20))) for size in (1, 2, 4)
    ]
    found = summarise(slopes(points))
    assert found.interval.low <= power <= found.interval.high
    assert found.median == pytest.approx(power, abs=0.08)


@pytest.mark.parametrize("axis", AXES)
def test_one_axis_at_a_time_is_scaled(axis: str) -> None:
    def sizes(case: Case) -> dict[str, int]:
        own = {"width": case.model.width, "depth": case.model.layers, "length": case.length, "batch": case.batch}
        return {**own, "context": case.prompt}

    case = dataclasses.replace(CASE, model=dataclasses.replace(SMALL, context=64))
    before, after = sizes(case), sizes(scaled(case, axis, 2))
    assert {name: after[name] // before[name] for name in AXES} == {name: 1 + (name == axis) for name in AXES}


# The command


def test_a_model_that_no_machine_here_could_hold_is_predicted_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["model=llama3_70b", "data.length=4096", "data.batch=1", "hardware=h100", "tracking=none", "run_dir=asked"]
    assert run(main, Predict, asked) == 0
    assert "Predicted for NVIDIA H100 SXM5 80GB, at least: forward 620 ms" in capsys.readouterr().out
    assert {row.provenance for row in read(tmp_path / "asked" / "results.jsonl").rows} == {"predicted"}


def test_hardware_that_is_not_known_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(main, Predict, ["hardware=h1000"]) == 2
    assert "hardware=h1000 is not known: did you mean h100" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_errors_that_plans_state_are_no_narrower_than_those_recorded() -> None:
    recorded = read(Path(__file__).parents[2] / "docs" / "recorded" / "predict" / "results.jsonl")
    for phase, (least, most) in HELD_OUT.items():
        found = [row.number for row in select(recorded, quantity="error", phase=phase, of="time")]
        assert least <= min(found) <= max(found) <= most
