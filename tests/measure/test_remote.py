"""Work in a process of its own, on command."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

import pytest

from isoforward.base.errors import BadInput
from isoforward.measure.benchmark import Part
from isoforward.measure.remote import remote

PART = Part(life="training", phase="step", per="step", conditions={})


def tell(line: Connection, factor: float) -> None:
    while True:
        line.send((line.recv() * factor, float(os.getpid())))


def die(line: Connection) -> None:
    line.recv()
    os._exit(3)


def test_each_command_is_answered_by_one_other_process() -> None:
    work = remote((PART, PART), tell, 0.5)
    (one, its), (two, again) = work.run(4), work.run(10)
    assert (one, two) == (2.0, 5.0)
    assert its == again != os.getpid()


def test_a_process_that_died_is_said_to_have() -> None:
    work = remote((PART,), die)
    with pytest.raises(BadInput, match="ended early"):
        work.run(1)
