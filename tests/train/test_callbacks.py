"""What is told while training goes on."""

import io
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from isoforward.train.callbacks import Watch, shares_of
from isoforward.train.lightning_module import Timed
from isoforward.train.pace import Pace


def test_shares_are_of_the_steps_and_of_the_waits_for_their_data() -> None:
    laps = [{"forward": 1.0, "backward": 2.0, "residual": 0.5, "step": 4.0}, {"forward": 2.0, "step": 4.0}]
    assert shares_of(laps, [1.5, 0.5]) == pytest.approx({"data": 0.2, "forward": 0.3, "backward": 0.2})
    assert shares_of([], []) == {}
    assert shares_of([], [1.5]) == {}  # of a wait alone everything would be data


def test_a_resumed_run_shows_the_loss_of_its_first_step() -> None:
    watch = Watch(Console(force_terminal=True, file=io.StringIO()), tokens_per_step=8, bytes_per_token=None, live=True)
    trainer = SimpleNamespace(max_steps=100, global_step=58)
    module = SimpleNamespace(loss=torch.tensor(2.5), pace=Pace(), recent=[], waits_s=[0.1])
    watch.on_train_start(trainer, module)
    trainer.global_step = 59
    watch.on_train_batch_end(trainer, module, None, None, 58)
    watch.close()
    assert watch.loss == 2.5


def test_a_loader_gives_its_batches_and_every_wait_for_one() -> None:
    waits = deque[float](maxlen=3)
    assert list(Timed([1, 2, 3, 4, 5], waits)) == [1, 2, 3, 4, 5]
    assert len(waits) == 3
    assert min(waits) >= 0
