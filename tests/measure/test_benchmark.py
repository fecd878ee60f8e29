"""The runner, on works whose times are planted: what it decides, when it stops, and what it takes again."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from isoforward.base.config import MeasureConfig
from isoforward.base.device import device_of
from isoforward.base.disturbance import Reading
from isoforward.base.errors import BadInput
from isoforward.base.stopwatch import Stopwatch
from isoforward.measure.benchmark import (
    LONGEST_S,
    SHORTEST_S,
    Part,
    Work,
    _progress,
    blocks_of,
    measure,
    phased,
    timed,
)
from isoforward.measure.trust import findings

FIXED = MeasureConfig(repeats=40, warmup=1)


def part(phase: str, **conditions: int) -> Part:
    return Part(life="training", phase=phase, per="step", conditions=conditions)


def planted(phase: str, time_s: float, *, noise: float = 0.02, seed: int = 0, **conditions: int) -> Work:
    draw = random.Random(seed)

    def run(n: int) -> Sequence[float]:
        return (time_s * draw.lognormvariate(0, noise),)

    return Work(parts=(part(phase, **conditions),), run=run)


def still() -> Reading:
    return Reading(time_s=time.perf_counter(), run_delay_s=0.0, stolen_s=0.0, busy_s=0.0, own_s=0.0, throttled=0)


def test_a_planted_difference_is_found_and_equals_are_equal() -> None:
    base, same, slower = planted("forward", 1.0), planted("forward", 1.0, seed=1), planted("forward", 1.2, seed=2)
    pairs = [(same.parts[0], base.parts[0]), (slower.parts[0], base.parts[0])]
    found = measure([base, same, slower], pairs, FIXED, seed=3, look=still)
    equal, differs = (found.judgement(pair) for pair in pairs)
    assert equal.outcome == "equal"
    assert differs.outcome == "slower"
    assert differs.ratio.low <= 1.2 <= differs.ratio.high


def test_the_two_of_a_pair_run_one_directly_after_the_other_in_an_order_that_is_drawn() -> None:
    ran: list[str] = []

    def noting(name: str) -> Work:
        def run(n: int) -> Sequence[float]:
            ran.append(name)
            return (1.0,)

        return Work(parts=(part("forward"),), run=run)

    works = {name: noting(name) for name in "ABC"}
    a, b, c = (work.parts[0] for work in works.values())
    pairs = [(a, b), (c, b)]
    measure(list(works.values()), pairs, FIXED, seed=0, look=still)
    last = ran[-160:]
    timed_pairs = [first + second for first, second in zip(last[::2], last[1::2], strict=True)]
    assert set(timed_pairs) == {"AB", "BA", "CB", "BC"}
    assert 8 <= timed_pairs.count("AB") <= 32


def test_parts_of_one_work_are_paired_within_its_own_samples() -> None:
    work = Work(parts=(part("forward"), part("backward")), run=lambda n: (1.0, 2.0))
    forward, backward = work.parts
    (block,) = blocks_of([work], [(backward, forward)])
    assert block.works == (work,)
    found = measure([work], [(backward, forward)], FIXED, seed=0, look=still)
    assert found.judgement((backward, forward)).ratio.value == pytest.approx(2.0)


def test_what_is_known_at_once_does_not_spend_the_budget() -> None:
    calls = 0

    def run(n: int) -> Sequence[float]:
        nonlocal calls
        calls += 1
        time.sleep(0.001)
        return (1.0,)

    work = Work(parts=(part("forward"),), run=run)
    found = measure([work], [], MeasureConfig(budget=2.0, precision=0.01), seed=0, look=still)
    assert calls < 500  # of 2,000 that the budget has room for: the first look comes at an eighth of it
    assert found.estimate(*work.parts).interval.looks == 4


def test_noise_beyond_the_budget_is_left_undecided_at_the_stated_confidence() -> None:
    def sluggish(time_s: float, seed: int) -> Work:
        quick = planted("forward", time_s, noise=0.5, seed=seed)

        def run(n: int) -> Sequence[float]:
            time.sleep(0.002)
            return quick.run(n)

        return Work(parts=quick.parts, run=run)

    one, other = sluggish(1.0, 1), sluggish(1.01, 2)
    pair = (one.parts[0], other.parts[0])
    found = measure([one, other], [pair], MeasureConfig(budget=0.3), seed=0, look=still).judgement(pair)
    assert found.outcome == "undecided"
    assert found.needed_s is not None and found.needed_s > 0


def test_the_live_line_counts_known_times_as_the_verdict_does() -> None:
    plan = MeasureConfig(repeats=7, precision=0.05)
    works = [planted("forward", 1.0, noise=0.001, seed=1), planted("loss", 1.0, noise=0.5, seed=2)]
    found = measure(works, [], plan, seed=0, look=still)
    told, shown = findings(found), _progress(found.blocks, plan, found.disturbance, found.busiest)
    assert (shown.known, shown.asked) == (told.times - len(told.imprecise), told.times) == (1, 2)
    assert shown.worst == told.imprecise[0].half_width


def readings(disturbed: Callable[[int], bool]) -> Callable[[], Reading]:
    """One before and one after each pair; those of a disturbed pair are half its time apart in run delay."""
    delay_s = 0.0
    calls = itertools.count()

    def look() -> Reading:
        nonlocal delay_s
        n = next(calls)
        if n % 2 == 0 and n and disturbed(n // 2 - 1):
            delay_s += 1.0
        now_s = float(n)
        return Reading(time_s=now_s, run_delay_s=delay_s, stolen_s=0.0, busy_s=None, own_s=0.0, throttled=0)

    return look


def test_a_disturbed_pair_is_taken_again_whole_and_kept_apart() -> None:
    times: Iterator[int] = itertools.count(1)
    one, other = (Work(parts=(part("forward"),), run=lambda n: (float(next(times)),)) for _ in range(2))
    pair = (one.parts[0], other.parts[0])
    looks = readings(lambda n: n == 4)
    found = measure([one, other], [pair], MeasureConfig(repeats=10, warmup=1), seed=0, look=looks)
    (block,) = found.blocks
    assert block.again == 1
    assert [len(block.retaken[each]) for each in pair] == [1, 1]
    assert [len(block.samples[each]) for each in pair] == [10, 10]
    first, second = (block.retaken[each][0] for each in pair)
    assert abs(first - second) == 1.0  # the pair that ran together


def test_where_everything_is_disturbed_samples_are_kept_and_counted() -> None:
    work = Work(parts=(part("forward"),), run=lambda n: (1.0,))
    looks = readings(lambda n: True)
    found = measure([work], [], MeasureConfig(repeats=10, warmup=1), seed=0, look=looks)
    (block,) = found.blocks
    assert block.n == 10
    assert block.disturbed > 0
    assert block.again <= 3 + 0.5 * block.n


def test_a_slow_sample_without_a_cause_stays() -> None:
    times = itertools.cycle([1.0, 1.0, 1.0, 100.0])
    work = Work(parts=(part("forward"),), run=lambda n: (next(times),))
    found = measure([work], [], MeasureConfig(repeats=12, warmup=1), seed=0, look=still)
    assert 100.0 in found.estimate(*work.parts).samples


def test_ctrl_c_keeps_what_is_there() -> None:
    calls = itertools.count()

    def run(n: int) -> Sequence[float]:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return (1.0,)

    work = Work(parts=(part("forward"),), run=run)
    found = measure([work], [], FIXED, seed=0, look=still)
    assert found.stopped
    assert 5 <= found.estimate(*work.parts).n < 20


def test_a_budget_shorter_than_one_sample_is_refused_with_the_way_out() -> None:
    def run(n: int) -> Sequence[float]:
        time.sleep(0.05)
        return (0.05,)

    work = Work(parts=(part("forward"),), run=run)
    with pytest.raises(
        BadInput, match=r"measure\.budget=0\.01 is shorter than one sample .* write measure\.budget=\d+"
    ):
        measure([work], [], MeasureConfig(budget=0.01), seed=0, look=still)


def test_a_precision_finer_than_the_clock_is_refused_with_the_way_out() -> None:
    work = Work(parts=(part("forward"),), run=lambda n: (1e-6,), most=1)
    with pytest.raises(BadInput, match=r"measure\.precision=0\.05 is finer than the clock gives: .* training forward"):
        measure([work], [], MeasureConfig(), seed=0, look=still)


def test_a_budget_without_room_for_as_many_samples_as_an_interval_needs_is_refused() -> None:
    def run(n: int) -> Sequence[float]:
        time.sleep(0.01)
        return (0.01,)

    work = Work(parts=(part("forward"),), run=run)
    with pytest.raises(BadInput, match=r"measure\.budget=0\.05 has no room for 7 samples of each"):
        measure([work], [], MeasureConfig(budget=0.05), seed=0, look=still, fewest=7)


def test_one_sample_holds_enough_executions_for_the_clock() -> None:
    asked: list[int] = []
    quick = timed(device_of("cpu"), part("forward"), lambda: None)

    def run(n: int) -> Sequence[float]:
        asked.append(n)
        time.sleep(n * 1e-4)
        return (1e-4,)

    measure([Work(parts=quick.parts, run=run)], [], MeasureConfig(repeats=5, warmup=1), seed=0, look=still)
    assert asked[-1] * 1e-4 >= 0.5 * SHORTEST_S
    assert asked[-1] * 1e-4 <= LONGEST_S


def test_a_phased_step_gives_each_phase_its_time() -> None:
    def step(stopwatch: Stopwatch) -> None:
        with stopwatch("forward"):
            time.sleep(0.002)
        with stopwatch("backward"):
            pass

    parts = {"forward": part("forward"), "backward": part("backward")}
    forward_s, backward_s = phased(device_of("cpu"), parts, step).run(3)
    assert forward_s >= 0.002 > backward_s
