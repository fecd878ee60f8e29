"""Both lives' bench: what it times, and what it compares."""

from dataclasses import replace

import pytest

from isoforward.base.config import OptimConfig
from isoforward.measure.train_and_serve import bench
from tests.measure.cases import SMALL


@pytest.mark.parametrize(
    ("name", "steps"), [("adamw", [("adamw", None)]), ("muon", [("muon", None), ("adamw", "muon")])]
)
def test_a_step_is_timed_with_the_usual_optimizer_too_where_another_trained(name: str, steps: list[object]) -> None:
    built = bench(replace(SMALL, optim=OptimConfig(name=name)))
    parts = [part for work in built.works for part in work.parts if part.phase == "step"]
    assert [(part.conditions["optimizer"], part.conditions.get("in_place_of")) for part in parts] == steps
    compared = {first for first, second in built.pairs if (second.life, second.phase) == ("inference", "forward")}
    assert compared.issuperset(parts)
    for work in built.works:
        assert all(time_s >= 0 for time_s in work.run(1))
