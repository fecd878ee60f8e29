"""What is told while training goes on."""

from collections import deque

import pytest

from isoforward.train.callbacks import shares_of
from isoforward.train.lightning_module import Timed


def test_shares_are_of_the_steps_and_of_the_waits_for_their_data() -> None:
    laps = [{"forward": 1.0, "backward": 2.0, "residual": 0.5, "step": 4.0}, {"forward": 2.0, "step": 4.0}]
    assert shares_of(laps, [1.5, 0.5]) == pytest.approx({"data": 0.2, "forward": 0.3, "backward": 0.2})
    assert shares_of([], []) == {}


def test_a_loader_gives_its_batches_and_every_wait_for_one() -> None:
    waits = deque[float](maxlen=3)
    assert list(Timed([1, 2, 3, 4, 5], waits)) == [1, 2, 3, 4, 5]
    assert len(waits) == 3
    assert min(waits) >= 0
