from isoforward.train.pace import Pace, told_loss


def test_validation_and_checkpoints_are_no_part_of_it_nor_is_the_first_step() -> None:
    at = [0.0]
    pace = Pace(now=lambda: at[0])

    def step(took_s: float) -> None:
        at[0] += took_s
        pace.step_done()

    step(100.0)  # libraries are loaded
    assert pace.steps_per_s() is None
    step(2.0)
    assert pace.steps_per_s() == 0.5
    with pace.paused():  # a validation
        at[0] += 30.0
        assert pace.steps_per_s() == 0.5
        with pace.paused():  # a checkpoint in it
            at[0] += 30.0
    step(2.0)
    assert pace.steps_per_s() == 0.5
    pace.pause()  # training ends
    at[0] += 1000.0
    assert pace.steps_per_s() == 0.5


def test_a_checkpoint_after_the_first_step_is_left_out_too() -> None:
    at = [0.0]
    pace = Pace(now=lambda: at[0])
    pace.step_done()
    with pace.paused():
        at[0] += 50.0
    at[0] += 4.0
    pace.step_done()
    assert pace.steps_per_s() == 0.25


def test_a_device_has_done_its_work_before_a_pause_begins() -> None:
    settled: list[str] = []
    pace = Pace(lambda: settled.append("settled"))
    pace.step_done()
    with pace.paused():
        assert settled == ["settled", "settled"]


def test_a_loss_is_told_with_its_bits_where_there_is_text() -> None:
    assert told_loss(2.0, 1.23456) == "2.000 nats/token 1.235 bits/byte"
    assert told_loss(2.0, None) == "2.000 nats/token"
