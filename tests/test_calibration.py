"""Of a machine that anybody may be using, only what no load can change: which operators run, and what a file holds."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from isoforward.errors import BadInput
from isoforward.hardware import cpu_model, processors
from isoforward.measuring.operators import described
from isoforward.planning import calibration, devices
from isoforward.planning.calibration import Pace, attentions, beyond, products, time_operators
from isoforward.planning.devices import TABLE, Hardware, calibrated_here, kept_here, lookup, save


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def made_here(name: str, **identity: object) -> Hardware:
    ours = {"cpu": cpu_model(), "processors": len(processors())}
    return dataclasses.replace(TABLE["l4"], name=name, provenance="measured", calibration={"identity": ours | identity})


def test_each_product_is_timed_in_the_three_layouts_of_a_linear_layer() -> None:
    kinds = {described(call, call()).kind for call in products(torch.float32)}
    assert kinds == {f"product {layout} float32" for layout in ("nt", "nn", "tn")}


def test_what_is_timed_is_real_and_gives_what_its_formula_does() -> None:
    call = next(iter(products(torch.float32))).real()
    a, b = call.arguments
    assert torch.equal(call(), a @ b)


def test_attention_is_timed_causal_in_both_directions_and_decoding() -> None:
    kinds = {described(call, call()).kind for call in attentions(torch.bfloat16)}
    assert kinds == {"attention causal bfloat16", "attention backward causal bfloat16", "attention bfloat16"}


def test_no_more_is_laid_to_dispatch_than_nothing() -> None:
    found = beyond([1.0, 2.0, 4.0], [1, 10, 400], [1.0, 1.9, 3.5])
    assert found.dispatch_s == 0
    assert 0.8 < found.scale < 1


def test_a_clock_that_slows_down_changes_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [1.0]
    monkeypatch.setattr(calibration, "references", lambda: {"product": lambda: 5 * slow[0], "memory": lambda: slow[0]})
    monkeypatch.setattr(calibration, "timed", lambda call: 3 * slow[0])
    paced = Pace()
    slow[0] = 1.7
    call = next(iter(products(torch.float32)))
    operator = described(call, call())
    assert time_operators({operator: lambda: call}, paced)[operator] == pytest.approx(3)


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
    monkeypatch.setattr(calibration, "TOKENS", (1, 32))
    hardware = calibration.calibrate()
    save(tmp_path / "this.json", hardware)
    again = devices.load(tmp_path / "this.json")
    assert json.dumps(again.calibration) == json.dumps(hardware.calibration)
    assert again.peak_flops_per_s["fp32"] > 1e8
