"""Which models are drawn to check predictions on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from experiments.predict import MOST_FLOPS, Predict, answer, held_out, named
from isoforward.base.datasheets import TABLE
from isoforward.base.device import device_of
from isoforward.base.results import read, select
from isoforward.model import cost
from isoforward.plan.calibration import SAMPLES

HARDWARE = dataclasses.replace(TABLE["l4"], calibration={"identity": {"threads": 2}})


def test_each_seed_draws_other_models_and_none_that_was_calibrated_on() -> None:
    one, again, other = (list(held_out(Predict(seed=seed), HARDWARE)) for seed in (1, 1, 2))
    assert [named(case) for case in one] == [named(case) for case in again]
    assert not {named(case) for case in one} & {named(case) for case in other}
    known = {(family, width, layers) for family, width, _, layers, *_ in SAMPLES}
    for case in [*one, *other]:
        assert (case.model.family, case.model.width, case.model.layers) not in known
        assert 3 * cost.forward_flops(case.model, batch=case.batch, length=case.length).total <= MOST_FLOPS
    assert {case.model.family for case in one} == {"gpt2", "llama"}


def test_bf16_is_among_them_where_the_machine_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(type(device_of("cpu")), "multiplies_bf16", lambda self, has=has: has)
        kinds = {case.precision for case in held_out(Predict(), HARDWARE)}
        assert kinds == ({"fp32", "bf16"} if has else {"fp32"})


def test_phases_that_miss_the_goal_are_named_and_unmeasured_ones_among_them() -> None:
    results = read(Path(__file__).parents[2] / "docs" / "recorded" / "predict" / "results.jsonl")
    errors = {"forward": (0.08, -0.25), "backward": (0.01, 0.26), "prefill": (0.09, 0.09), "decode": (-0.02, 0.01)}
    like = select(results, quantity="error", of="time")[0]
    kept = [row for row in results.rows if row.quantity != "error"]
    made = [
        dataclasses.replace(like, phase=phase, value=value) for phase, both in errors.items() for value in (0.0, *both)
    ]
    said = answer(dataclasses.replace(results, rows=(*kept, *made)))
    assert "(goal: median at most 8%, worst 25%, missed by backward, prefill, loss, optimizer)" in said
