"""Operators are recorded as they are dispatched, and reckoned for any number of layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.measure.operators import Recorder, deepened, record_serving, record_training

SMALL = ModelConfig(layers=3, heads=2, width=32, vocab=96, context=32)


def test_layers_that_are_reckoned_are_those_that_would_be_recorded() -> None:
    one, two, four = (
        record_training(
            dataclasses.replace(SMALL, layers=n), batch=2, length=16, dtype=torch.bfloat16, optim=OptimConfig()
        ).works()
        for n in (1, 2, 4)
    )
    reckoned = deepened(one, two, 4)
    for phase in ("forward", "loss", "backward"):
        assert reckoned[phase] == four[phase]
    moved = {
        phase: sum(count * one.work for one, count in of["optimizer"].counts.items())
        for phase, of in (("reckoned", reckoned), ("recorded", four))
    }
    assert moved["reckoned"] == pytest.approx(moved["recorded"], rel=1e-3)


def test_serving_is_recorded_phase_by_phase_with_the_head_at_one_position() -> None:
    model = dataclasses.replace(SMALL, vocab=100)
    works = record_serving(model, batch=2, length=16, cached=20, dtype=torch.float32).works()
    heads = {phase: [one.size for one in work.counts if one.size[-1] == 100] for phase, work in works.items()}
    assert heads == {"prefill": [(2, 32, 100)], "decode": [(2, 32, 100)]}  # rows, in, out


def test_a_look_at_memory_is_dispatched_and_not_counted_and_lists_are_counted_one_by_one() -> None:
    recorder, ones = Recorder(timing=True), [torch.ones(4), torch.ones(6)]
    with recorder, recorder("step"):
        ones[0].view(2, 2)
        torch._foreach_mul_(ones, 2.0)
    (work,) = recorder.works().values()
    assert work.dispatched == 2
    assert work.operators == 2
    assert {one.work for one in work.counts} == {4 * 4, 4 * 6}  # bytes of each
