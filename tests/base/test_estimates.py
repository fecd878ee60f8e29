"""Intervals that hold their level, judgements that keep their stated rate, and a verdict that a CPU hog trips."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoforward.base.errors import BadInput
from isoforward.base.estimates import interleaved, judge, ratio, summarise
from isoforward.base.hardware import processors
from isoforward.base.results import Row
from isoforward.measure.trust import Reading, Watch, judge_trust, look

POSITIVE = st.floats(1e-9, 1e9)


# Estimates


def test_the_summary_of_a_sample_worked_by_hand() -> None:
    estimate = summarise([4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 30.0])
    assert estimate.median == 5.5
    assert (estimate.low, estimate.high) == (2.0, 9.0)
    assert estimate.spread == pytest.approx((7.75 - 3.25) / 1.349 / 5.5)
    assert estimate.range_relative == pytest.approx(29 / 5.5)
    assert estimate.outliers == 1
    assert estimate.samples == (4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 30.0)


@pytest.mark.parametrize(
    ("n", "first", "last", "confidence"),
    [
        (5, 1, 5, 0.9375),
        (6, 1, 6, 0.9688),
        (8, 1, 8, 0.9922),
        (9, 2, 8, 0.9609),
        (10, 2, 9, 0.9785),
        (15, 4, 12, 0.9648),
        (20, 6, 15, 0.9586),
        (25, 8, 18, 0.9567),
        (50, 18, 33, 0.9672),
    ],
)
def test_the_interval_has_the_published_ranks(n: int, first: int, last: int, confidence: float) -> None:
    """Tables of the sign test's interval for the median, as in Conover or in Hahn and Meeker."""
    estimate = summarise([float(rank) for rank in range(1, n + 1)])
    assert (estimate.low, estimate.high) == (first, last)
    assert estimate.confidence == pytest.approx(confidence, abs=5e-5)


@pytest.mark.parametrize(("n", "noise"), [(6, "lognormal"), (10, "standard_cauchy"), (20, "exponential")])
def test_the_interval_of_a_median_covers_it_as_often_as_it_says(n: int, noise: str) -> None:
    samples = getattr(np.random.default_rng(5), noise)(size=(2000, n))
    true = {"lognormal": 1.0, "standard_cauchy": 0.0, "exponential": math.log(2)}[noise]
    estimates = [summarise(one) for one in samples]
    covered = np.mean([one.low <= true <= one.high for one in estimates])
    assert covered == pytest.approx(estimates[0].confidence, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


def test_an_outlier_is_counted_and_stays_in_the_samples() -> None:
    estimate = summarise([1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 50.0])
    assert estimate.outliers == 1
    assert 50.0 in estimate.samples
    assert estimate.range_relative == pytest.approx(49.02)


def test_a_median_of_nothing_has_no_relative_spread() -> None:
    estimate = summarise([0.0, 0.0, 0.0, 1.0, -1.0])
    assert (estimate.spread, estimate.range_relative) == (None, None)


@pytest.mark.parametrize("samples", [[], [1.0] * 4])
def test_too_few_samples_are_refused(samples: list[float]) -> None:
    with pytest.raises(BadInput, match=f"{len(samples)} samples are too few"):
        summarise(samples)
    with pytest.raises(BadInput, match="too few"):
        ratio(samples, samples)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(BadInput, match="sample 3 of 6"):
        summarise([1, 2, bad, 4, 5, 6])


def test_an_estimate_becomes_a_measured_row() -> None:
    estimate = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    row = estimate.row(experiment="e", life="training", phase="loss", quantity="time", unit="s", per="step")
    assert (row.value, row.low, row.high, row.samples) == (3.0, 1.0, 5.0, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert row.provenance == "measured"


# Ratios and judgements


@settings(deadline=None)
@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=5, max_size=40), st.booleans())
def test_swapping_the_two_inverts_the_ratio_and_its_interval(pairs: list[tuple[float, float]], paired: bool) -> None:
    a, b = [one for one, _ in pairs], [other for _, other in pairs]
    there, back = ratio(a, b, paired=paired), ratio(b, a, paired=paired)
    assert there.value * back.value == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1)
    assert there.low <= there.value * (1 + 1e-12)
    assert there.value <= there.high * (1 + 1e-12)


def test_pairing_takes_out_what_a_round_shares() -> None:
    mood = [1.0, 3.0, 9.0, 2.0, 27.0, 4.0, 81.0, 5.0]
    paired = ratio([2 * m for m in mood], mood)
    assert (paired.low, paired.value, paired.high) == pytest.approx((2, 2, 2))
    assert judge(paired).outcome == "slower"
    unpaired = ratio([2 * m for m in mood], mood, paired=False)
    assert unpaired.value == pytest.approx(2)
    assert unpaired.low < 1 < unpaired.high
    assert judge(unpaired).outcome == "no difference"


def test_samples_of_unlike_number_cannot_be_paired() -> None:
    with pytest.raises(BadInput, match="5 and 6 samples"):
        ratio([1.0] * 5, [1.0] * 6)
    assert ratio([2.0] * 5, [1.0] * 6, paired=False).value == 2


def test_a_sample_of_zero_has_no_ratio() -> None:
    with pytest.raises(BadInput, match="above 0"):
        ratio([1.0] * 5, [0.0, 1.0, 1.0, 1.0, 1.0])


def test_what_is_judged_and_why() -> None:
    base = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01]
    assert judge(ratio([0.5 * b for b in base], base)).outcome == "faster"
    assert judge(ratio([1.5 * b for b in base], base)).outcome == "slower"
    close = judge(ratio([1.005 * b for b in base], base))
    assert (close.outcome, "within 1.0% of 1" in close.reason) == ("no difference", True)
    assert judge(ratio([1.005 * b for b in base], base), tolerance=0.001).outcome == "slower"
    torn = judge(ratio([1.5, 0.6, 1.5, 0.6, 1.5, 0.6], [1.0] * 6))
    assert (torn.outcome, "holds 1" in torn.reason) == ("no difference", True)


def test_five_pairs_cannot_show_a_difference_at_the_stated_rate() -> None:
    five = judge(ratio([2.0] * 5, [1.0] * 5))
    assert (five.outcome, "93.8% only" in five.reason) == ("too few samples", True)
    assert judge(ratio([2.0] * 6, [1.0] * 6)).outcome == "slower"


def test_interleaving_runs_every_case_once_a_round_in_an_order_drawn_anew() -> None:
    seen: list[str] = []
    cases: dict[str, Callable[[], int]] = {
        name: lambda name=name: seen.append(name) or len(seen)  # type: ignore[misc, func-returns-value]
        for name in "abc"
    }
    samples = interleaved(cases, 40, seed=3)
    rounds = [tuple(seen[i : i + 3]) for i in range(0, 120, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert sum(one.index("a") < one.index("b") for one in rounds) == 20
    assert sum(one.index("a") < one.index("c") for one in rounds) == 20
    assert [seen[turn - 1] for turn in samples["b"]] == ["b"] * 40
    assert [(turn - 1) // 3 for turn in samples["b"]] == list(range(40))


def noise(seed: int) -> Iterator[float]:
    """Seconds as a bad machine gives them: drifting, correlated from sample to sample, in bursts with a heavy tail, and
    the second of a round, which finds its caches warm, the shorter one."""
    draw = random.Random(seed)
    lasting = 0.0
    for age in itertools.count():
        lasting = 0.8 * lasting + draw.gauss(0, 0.03)
        burst = draw.paretovariate(1.2) - 1 if draw.random() < 0.1 else 0.0
        yield 0.01 * math.exp(lasting) * (1 + burst) * (1 + 0.002 * age) * (0.98 if age % 2 else 1.0)


def compared(run: int, *, seed: int, slower: float = 1.0) -> str:
    machine = noise(10**6 + run)
    samples = interleaved({"a": lambda: next(machine) * slower, "b": lambda: next(machine)}, 20, seed=seed)
    return judge(ratio(samples["a"], samples["b"]), tolerance=0.0).outcome


@pytest.mark.parametrize("seed", [None, 1234, 7], ids=["orders drawn anew", "one order", "another"])
def test_equals_are_told_apart_no_more_often_than_stated(seed: int | None) -> None:
    runs = 1000
    told_apart = sum(compared(run, seed=run if seed is None else seed) != "no difference" for run in range(runs))
    # The stated rate at 20 pairs is 1 - 0.9586; three standard deviations above it.
    assert told_apart / runs < 0.0414 + 3 * math.sqrt(0.0414 * 0.9586 / runs)
    assert told_apart > 0


def test_noise_that_alternates_from_round_to_round_is_not_taken_for_a_difference() -> None:
    """The first of one round pays, then the second of the next: orders that alternated as well would follow it."""

    def told_apart(run: int) -> bool:
        draw, pays = random.Random(10**6 + run), itertools.cycle([2.0, 1.0, 1.0, 2.0])
        machine: Callable[[], float] = lambda: next(pays) * draw.uniform(1.0, 1.1)  # noqa: E731
        samples = interleaved({"a": machine, "b": machine}, 20, seed=run)
        return judge(ratio(samples["a"], samples["b"])).outcome != "no difference"

    assert sum(map(told_apart, range(1000))) < 60


def test_a_difference_that_is_there_is_found_in_the_same_noise() -> None:
    found = [compared(run, seed=run, slower=1.1) for run in range(100)]
    assert found.count("slower") > 90
    assert "faster" not in found


# Trust

QUIET = Reading(
    time_s=100.0,
    own_cpu_s=10.0,
    all_cpu_s=500.0,
    stolen_cpu_s=7.0,
    runnable=0,
    throttled=4,
    preempted=50,
    load=0.4,
)


def watched(
    before: Reading = QUIET, *, seconds: float = 10.0, reference_s: Sequence[float] = (0.002, 0.002), **changes: float
) -> Watch:
    """A Watch over ten seconds in which we kept one processor busy and nobody else did anything, but for `changes`."""
    after = replace(before, time_s=before.time_s + seconds, own_cpu_s=before.own_cpu_s + seconds)
    after = replace(after, all_cpu_s=None if before.all_cpu_s is None else before.all_cpu_s + seconds)
    after = replace(after, **changes)  # type: ignore[arg-type]
    with Watch(iter(reference_s).__next__, look=iter((before, after)).__next__) as watch:
        pass
    return watch


def timed(*samples: float, phase: str = "forward", **conditions: int) -> Row:
    about = {"experiment": "e", "life": "training", "unit": "s", "per": "step", "quantity": "time"}
    return summarise(samples).row(**about, phase=phase, conditions=conditions)


STEADY = timed(0.0100, 0.0101, 0.0099, 0.0100, 0.0102)


def test_a_quiet_machine_and_steady_samples_are_trusted() -> None:
    verdict = judge_trust("e", [STEADY], watched(), environment="abc")
    assert (verdict.trusted, verdict.reasons, verdict.environment) == (True, (), "abc")
    assert verdict.figures["load"] == 0.4
    assert verdict.figures["others_cores"] == 0
    assert verdict.figures["drift"] == 0
    assert verdict.figures["spread"] == pytest.approx(0.01 / 1.349, rel=1e-6)
    assert verdict.figures["range"] == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("watch", "why"),
    [
        (watched(all_cpu_s=500.0 + 10.0 + 6.0), "other processes kept 0.6"),
        (watched(stolen_cpu_s=7.0 + 1.0), "hypervisor took 9%"),
        (watched(replace(QUIET, runnable=2), runnable=3), "2 threads of others"),
        (watched(throttled=9), "ran out in 5 periods"),
        (watched(preempted=50 + 2000), "preempted 200 times a second"),
        (watched(reference_s=(0.002, 0.0022)), "drift: the reference kernel took +10%"),
        (watched(reference_s=(0.002, 0.0018)), "drift: the reference kernel took -10%"),
        (watched(replace(QUIET, all_cpu_s=None, load=64.5)), "load average of 64.5"),
    ],
    ids=["others", "stolen", "runnable", "throttled", "preempted", "slower", "faster", "load alone"],
)
def test_each_disturbance_is_a_reason_of_its_own(watch: Watch, why: str) -> None:
    verdict = judge_trust("e", [STEADY], watch)
    assert not verdict.trusted
    assert len(verdict.reasons) == 1
    assert why in verdict.reasons[0]


def test_what_a_system_does_not_tell_is_no_reason_and_no_figure() -> None:
    unknown = replace(QUIET, all_cpu_s=None, stolen_cpu_s=None, runnable=None, throttled=None)
    verdict = judge_trust("e", [STEADY], watched(unknown))
    assert verdict.trusted
    assert verdict.figures.keys().isdisjoint({"others_cores", "stolen_share", "runnable_others", "throttled"})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (timed(0.010, 0.011, 0.012, 0.013, 0.014, phase="loss"), "spread: 1 of 2 times vary by 10%"),
        (timed(0.010, 0.010, 0.010, 0.010, 0.016, phase="loss"), "range: 1 of 2 times vary by 50%"),
        (timed(0.0005, 0.0005, 0.0005, 0.0005, 0.0005, phase="loss"), "short: 1 of 2 times"),
    ],
    ids=["spread", "range", "short"],
)
def test_unsteady_or_short_samples_are_a_reason_that_names_the_worst(row: Row, why: str) -> None:
    verdict = judge_trust("e", [STEADY, row], watched())
    assert len(verdict.reasons) == 1
    assert why in verdict.reasons[0]
    assert "training loss" in verdict.reasons[0]


def test_a_mean_over_many_executions_is_as_long_as_all_of_them() -> None:
    assert judge_trust("e", [timed(*[0.0005] * 5, executions=8)], watched()).trusted


def test_residuals_and_other_quantities_are_not_times_to_be_steady() -> None:
    residual = timed(1e-9, -3e-9, 5e-9, 2e-9, 9e-9, phase="residual")
    energy = replace(timed(1.0, 2.0, 3.0, 4.0, 5.0), quantity="energy", unit="joule")
    assert judge_trust("e", [STEADY, residual, energy], watched()).trusted


def test_a_reason_from_elsewhere_takes_the_trust_away() -> None:
    verdict = judge_trust("e", [STEADY], watched(), also=["residual: 3% of the step"])
    assert (verdict.trusted, verdict.reasons) == (False, ("residual: 3% of the step",))


def test_a_hog_on_every_processor_trips_the_verdict() -> None:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in processors()]
    try:
        time.sleep(0.2)
        with Watch(lambda: 1.0) as watch:
            until_s = time.perf_counter() + 1.0
            while time.perf_counter() < until_s:
                sum(range(1000))
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    verdict = judge_trust("e", [STEADY], watch)
    assert not verdict.trusted
    assert any(reason.startswith("contention") for reason in verdict.reasons)


def test_work_of_our_own_is_in_our_time_and_in_that_of_the_processors() -> None:
    before = look()
    until_s = time.process_time() + 0.3
    while time.process_time() < until_s:
        sum(range(1000))
    after = look()
    assert 0.25 < after.own_cpu_s - before.own_cpu_s < 1
    if before.all_cpu_s is not None and after.all_cpu_s is not None:
        elapsed_s = after.time_s - before.time_s
        assert 0.1 < after.all_cpu_s - before.all_cpu_s < 2 * len(processors()) * elapsed_s
