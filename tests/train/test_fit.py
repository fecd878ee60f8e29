"""What a whole training does is in tests/app/test_train.py and tests/test_end_to_end.py."""

from isoforward.base.config import TrainerConfig
from isoforward.train.fit import TIME, ended_by
from isoforward.train.stopping import StopOnTime


def test_what_ended_a_training_before_its_last_step() -> None:
    plan, clock = TrainerConfig(max_steps=10, early_stopping=2), StopOnTime(1.0)
    assert ended_by(10, plan, clock) is None
    assert ended_by(9, plan, clock) == "trainer.early_stopping"
    clock.up = True
    assert ended_by(9, plan, clock) == TIME
    assert ended_by(10, plan, clock) is None  # at its last step it is over
    assert ended_by(9, TrainerConfig(max_steps=10), None) is None  # a signal
