"""Every moment belongs to one phase; where steps are cut."""

from isoforward.attach.account import Account
from isoforward.attach.sampling import Sampling
from tests.attach.planted_training import PlantedClock, told

ALL = Sampling(every=1, warmup=0, count_flops=False)


def step_of(account: Account, clock: PlantedClock) -> None:
    """Fetch 1, forward 2, loss 4, backward 8, optimizer 16, and 32 for what comes then."""
    depth = account.enter("data")
    clock.take(1)
    account.leave(depth)
    depth = account.enter("forward")
    clock.take(2)
    account.forward_ended(depth)
    clock.take(4)
    depth = account.enter("backward")
    clock.take(8)
    account.leave(depth)
    depth = account.step_begins(leads=True)
    clock.take(16)
    account.step_ended(depth, leads=True)
    clock.take(32)


WHOLE_STEP = {"data": 1, "forward": 2, "loss": 4, "backward": 8, "optimizer": 16, "residual": 32}


def test_the_innermost_phase_has_the_moment_and_all_add_up() -> None:
    clock = PlantedClock()
    account = Account(clock, ALL)
    outer = account.enter("logging")
    clock.take(1)
    inner = account.enter("transfer")
    clock.take(2)
    account.leave(inner)
    clock.take(4)
    account.leave(outer)
    account.stepped = True
    account.close()
    (step,) = account.steps
    assert told(step.phases) == {"logging": 5, "transfer": 2}
    assert step.seconds == 7


def test_a_step_ends_where_the_next_batch_is_fetched() -> None:
    clock = PlantedClock()
    account = Account(clock, ALL)
    for _ in range(3):
        step_of(account, clock)
    account.close()
    assert [told(step.phases) for step in account.steps] == [WHOLE_STEP] * 3


def test_after_a_forward_comes_loss_another_forward_or_neither() -> None:
    clock = PlantedClock()
    account = Account(clock, ALL)
    for seconds in (1, 4):
        depth = account.enter("forward")
        clock.take(seconds)
        account.forward_ended(depth)
        clock.take(2 * seconds)
    account.leave(account.enter("optimizer"))  # zero_grad, as it often stands before the backward
    clock.take(16)
    account.leave(account.enter("backward"))
    depth = account.enter("forward")
    account.forward_ended(depth)
    clock.take(32)  # no backward follows
    account.leave(account.enter("data"))
    account.stepped = True
    account.close()
    assert told(account.steps[0].phases) == {"forward": 7, "loss": 24, "residual": 32}


def test_validation_and_checkpointing_are_no_part_of_a_step_and_never_missed() -> None:
    clock = PlantedClock()
    account = Account(clock, Sampling(every=10**9, warmup=0, count_flops=False))
    for _ in range(2):
        step_of(account, clock)
        validation = account.enter("validation")
        clock.take(100)
        assert account.enter("forward") == -1
        saving = account.enter("checkpointing")
        clock.take(1000)
        account.leave(saving)
        clock.take(100)
        account.leave(validation)
    account.close()
    assert [step.seconds for step in account.steps] == [sum(WHOLE_STEP.values())] * 2
    assert account.occasions_s == {"validation": 400, "checkpointing": 2000}


def test_a_phase_left_by_an_exception_is_closed_by_the_one_around_it() -> None:
    clock = PlantedClock()
    account = Account(clock, ALL)
    outer = account.enter("logging")
    account.enter("transfer")  # never left
    clock.take(1)
    account.leave(outer)
    clock.take(2)
    assert account.phase == "residual"


def test_a_step_that_was_not_whole_is_no_step() -> None:
    clock = PlantedClock()
    account = Account(clock, ALL)
    step_of(account, clock)
    depth = account.enter("data")
    account.leave(depth)
    account.close()
    assert len(account.steps) == 1


def test_a_loop_that_fetches_nothing_is_cut_at_its_forward() -> None:
    clock = PlantedClock()
    account = Account(clock, ALL)
    for _ in range(4):
        depth = account.enter("forward")
        clock.take(2)
        account.forward_ended(depth)
        account.leave(account.enter("backward"))
        depth = account.step_begins(leads=True)
        account.step_ended(depth, leads=True)
    account.close()
    assert [told(step.phases) for step in account.steps] == [{"forward": 2}] * 4
