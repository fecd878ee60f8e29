from types import SimpleNamespace

import pytest
import torch

from isoforward.base.config import ModelConfig
from isoforward.base.device import CpuDevice
from isoforward.measure import learning_curves
from isoforward.measure.case import Case
from isoforward.measure.learning_curves import Curve, Point, loss_rows, reached_s


def curve(*points: tuple[float, float]) -> list[Point]:
    return [Point(step=n, time_s=time_s, loss=loss) for n, (time_s, loss) in enumerate(points, 1)]


@pytest.mark.parametrize(
    ("loss", "time_s"),
    [(3.5, 1.0), (3.0, 1.0), (2.75, 1.5), (2.5, 2.0), (2.1, 5.0), (2.0, 6.0), (1.9, None)],
)
def test_a_loss_is_reached_on_the_straight_line_that_first_comes_down_to_it(loss: float, time_s: float | None) -> None:
    points = curve((1, 3.0), (2, 2.5), (3, 2.6), (4, 2.2), (6, 2.0))
    assert reached_s(points, loss) == (None if time_s is None else pytest.approx(time_s))


def test_steps_that_the_device_has_not_done_yet_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(learning_curves, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    monkeypatch.setattr(CpuDevice, "settle", lambda device: now_s.append(now_s.pop() + 3.0))
    watch = Curve()
    watch.on_train_start()
    watch.on_validation_start(None, SimpleNamespace(device=torch.device("cpu")))
    assert watch.spent_s == 3.0


def test_a_mark_is_the_median_of_the_seeds_between_the_lowest_and_the_highest() -> None:
    runs = [curve((1.0, 3.0), (2.0, 2.0)), curve((1.5, 3.3), (2.6, 2.1)), curve((1.2, 2.9), (2.4, 2.4))]
    rows = list(loss_rows(Case(experiment="x", model=ModelConfig(vocab=5)), runs, recipe="mine"))
    assert [(row.value, row.low, row.high) for row in rows] == [(3.0, 2.9, 3.3), (2.1, 2.0, 2.4)]
    assert [row.conditions["training_time_s"] for row in rows] == [1.2, 2.4]
    assert [row.conditions["step"] for row in rows] == [1, 2]
