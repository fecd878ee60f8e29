"""Which steps are timed: drawn, after the warm-up, and fewer where timing is dear."""

from itertools import islice

from isoforward.attach.account import Account
from isoforward.attach.sampling import BOUND, COUNTED, ENOUGH, RARER, TIMED, WARMUP, WHOLE, Draws, Sampling
from tests.attach.planted_training import PlantedClock


def test_steps_are_drawn_and_those_at_the_beginning_are_left_out() -> None:
    draws = Draws(Sampling(every=4, warmup=3))
    kinds = list(islice((kind for kind, steps in draws.runs() for _ in range(steps)), 1004))
    assert kinds[:4] == [WARMUP] * 3 + [COUNTED]
    places = [kinds[at : at + 4].index(TIMED) for at in range(4, 1004, 4)]
    assert kinds.count(TIMED) == len(places) and kinds.count(WHOLE) == 3 * len(places)  # one in each four
    assert all(40 < places.count(place) < 90 for place in range(4))  # at no fixed place


def shares(cost: float, *, steps: int = 8000, every: int = 4) -> tuple[float, float]:
    """Of steps that are timed, and of time that it takes, once it is known what a timed step costs."""
    clock = PlantedClock()
    account = Account(clock, Sampling(every=every, warmup=0, count_flops=False))
    timed, spent = 0, 0.0
    for step in range(steps):
        depth = account.enter("data")
        before = clock.now
        drift = 1.0 + step / steps  # steps become longer as they go
        clock.take(drift * (1.0 + cost * (account.kind == TIMED)))
        account.leave(depth)
        depth = account.step_begins(leads=True)
        account.step_ended(depth, leads=True)
        if step >= steps // 2:
            timed += account.kind == TIMED
            spent += clock.now - before - drift
    account.close()
    return timed / (steps / 2), spent / (1.75 * steps / 2)


def test_the_dearer_a_timed_step_the_fewer_are_timed() -> None:
    for cost in (0.0, 0.01, 0.1, 1.0):
        timed, spent = shares(cost)
        assert spent <= 1.1 * BOUND
        fewest = 1 / (4 * RARER)
        assert timed == fewest if cost * fewest <= BOUND else timed > 0.8 * BOUND / cost  # as many as that allows


def test_after_enough_timed_steps_there_are_fewer() -> None:
    draws = Draws(Sampling(every=4))
    for timed in range(ENOUGH):
        assert draws.interval() == 4, timed
        draws.took(TIMED, 0.02)
    assert draws.interval() == 4 * RARER


def test_setting_hooks_and_undoing_them_is_a_part_of_what_timing_costs() -> None:
    draws = Draws(Sampling(every=4))
    for _ in range(8):
        draws.took(WHOLE, 0.02)
        draws.took(TIMED, 0.02)
    assert draws.interval() == 4
    draws.changed(TIMED, 0.00029)
    draws.changed(WHOLE, 0.00029)
    draws.changed(COUNTED, 1.0)  # once
    assert draws.interval() == 10  # 0.58 ms are 2.9 % of a step


def test_one_in_one_is_taken_at_its_word() -> None:
    assert shares(1.0, every=1)[0] == 1.0  # there is no other step to hold it against
