"""Intervals against worked examples, judgements in words, and quick looks at the simulated rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoforward.base.errors import BadInput
from isoforward.base.statistics import (
    KINDS,
    LOOKS,
    Judgement,
    Look,
    Samples,
    estimate_across,
    judge,
    ratio,
    ratio_across,
    ratio_unpaired,
    summarise,
    trend,
)
from tests.base.noise import NOISES, compared, pairs

POSITIVE = st.floats(1e-9, 1e9)
# Hollander, Wolfe and Chicken, table 3.1: a depression scale of nine patients before and after a tranquilliser.
BEFORE = (1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30)
AFTER = (0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29)


# Estimates


def test_the_summary_of_a_sample_worked_by_hand() -> None:
    estimate = summarise([4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 30.0])
    assert (estimate.median, estimate.n) == (5.5, 10)
    assert (estimate.interval.low, estimate.interval.high) == (2.0, 9.0)
    assert estimate.interval.kind == "order statistics"
    assert estimate.precision == pytest.approx(3.5 / 5.5)
    assert estimate.samples == (4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 30.0)


def test_an_outlier_stays_in_the_samples() -> None:
    assert max(summarise([1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 50.0]).samples) == 50.0


def test_a_median_of_nothing_has_no_precision() -> None:
    assert not summarise([0.0, 0.0, 0.0, 1.0, -1.0]).known(0.5)


def test_five_samples_state_what_they_attain_and_are_never_known() -> None:
    interval = summarise([2.0] * 5).interval
    assert (interval.kind, interval.confidence) == ("range", 0.9375)
    assert not summarise([2.0] * 5).known(0.01)
    assert summarise([2.0] * 6).known(0.01)


def test_samples_that_go_in_waves_have_a_wider_interval_than_the_same_in_any_order() -> None:
    waves = 1 + 0.1 * np.sin(np.linspace(0, 6 * np.pi, 120))
    shuffled = summarise(np.random.default_rng(2).permutation(waves))
    ordered = summarise(waves)
    assert ordered.interval.kind == "batched order statistics"
    assert ordered.precision > 2 * shuffled.precision
    assert ordered.median == shuffled.median


@pytest.mark.parametrize("samples", [[], [1.0] * 4])
def test_too_few_samples_are_refused(samples: list[float]) -> None:
    for use in (summarise, trend, lambda s: ratio(s, s), lambda s: ratio_unpaired(s, s)):
        with pytest.raises(BadInput, match=f"{len(samples)} samples are too few"):
            use(samples)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(BadInput, match="sample 3 of 6"):
        summarise([1, 2, bad, 4, 5, 6])


# Ratios


def test_the_ratio_of_the_textbook() -> None:
    """Hollander, Wolfe and Chicken, 3.1 to 3.3: estimate -0.46, interval of 96.1 % from -0.786 to -0.010."""
    found = ratio(np.exp(AFTER), np.exp(BEFORE))
    low, value, high = np.log([found.interval.low, found.value, found.interval.high])
    assert (low, value, high) == (pytest.approx(-0.786), pytest.approx(-0.46), pytest.approx(-0.010))
    assert found.interval.confidence == pytest.approx(0.961, abs=5e-4)
    assert (found.interval.kind, found.interval.looks, found.n) == ("signed rank", 1, 9)


@settings(deadline=None)
@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=5, max_size=40), st.booleans())
def test_swapping_the_two_inverts_the_ratio_and_its_interval(both: list[tuple[float, float]], paired: bool) -> None:
    a, b = [one for one, _ in both], [other for _, other in both]
    compare = ratio if paired else ratio_unpaired
    there, back = compare(a, b), compare(b, a)
    assert there.value * back.value == pytest.approx(1)
    assert there.interval.low * back.interval.high == pytest.approx(1)
    assert there.interval.low <= there.value * (1 + 1e-9)
    assert there.value <= there.interval.high * (1 + 1e-9)
    assert there.interval.kind in KINDS


def test_pairing_takes_out_what_a_pair_shares() -> None:
    mood = np.array([1.0, 3.0, 9.0, 2.0, 27.0, 4.0, 81.0, 5.0])
    paired = ratio(2 * mood, mood)
    assert (paired.interval.low, paired.value, paired.interval.high) == pytest.approx((2, 2, 2))
    assert judge(paired).outcome == "slower"
    unpaired = ratio_unpaired(2 * mood, mood)
    assert unpaired.value == pytest.approx(2)
    assert judge(unpaired).outcome == "undecided"


def test_an_order_given_as_covariate_takes_out_what_the_second_place_gains() -> None:
    draw = np.random.default_rng(1)
    order = draw.choice([-1.0, 1.0], 60)
    a = 1.3 * np.exp(0.1 * order + draw.normal(0, 0.01, 60))
    plain, found = ratio(a, np.ones(60)), ratio(a, np.ones(60), covariate=order)
    assert found.value == pytest.approx(1.3, abs=0.01)
    assert found.interval.high - found.interval.low < 0.5 * (plain.interval.high - plain.interval.low)
    assert ratio(a, np.ones(60), covariate=np.zeros(60)).interval == plain.interval


def test_log_ratios_that_are_not_symmetric_show_the_hull_of_both_tests() -> None:
    skewed = np.exp(np.random.default_rng(0).exponential(size=300))
    found = ratio(skewed, np.ones(300))
    assert found.interval.kind == "signed rank and sign test"
    assert found.interval.low < np.median(skewed) < found.value < found.interval.high


def test_pairs_and_their_covariates_must_match() -> None:
    with pytest.raises(BadInput, match="5 and 6 samples"):
        ratio([1.0] * 5, [1.0] * 6)
    with pytest.raises(BadInput, match="6 numbers are no covariate of 5 pairs"):
        ratio([1.0] * 5, [1.0] * 5, covariate=[1.0] * 6)
    assert ratio_unpaired([2.0] * 5, [1.0] * 6).value == pytest.approx(2)


def test_a_sample_of_zero_has_no_ratio() -> None:
    with pytest.raises(BadInput, match="above 0"):
        ratio([1.0] * 5, [0.0, 1.0, 1.0, 1.0, 1.0])


# Judgements


def judged(logs: Samples, *, margin: float = 0.03, spent_s: float | None = None) -> Judgement:
    return judge(ratio(np.exp(logs), np.ones(len(logs))), margin=margin, spent_s=spent_s)


def test_what_differs_says_its_interval() -> None:
    slower = judged(np.log([1.30, 1.31, 1.32, 1.33, 1.34, 1.28, 1.37, 1.32]))
    assert (slower.outcome, slower.differs, slower.settled, slower.factor) == ("slower", True, True, None)
    assert slower.sentence() == "1.32x (1.30x to 1.34x)"
    assert judged(np.log([0.5, 0.51, 0.49, 0.5, 0.5, 0.5])).outcome == "faster"


def test_a_difference_inside_the_margin_still_differs() -> None:
    small = judged([0.010, 0.011, 0.009, 0.010, 0.012, 0.008, 0.010])
    assert small.outcome == "slower"
    assert small.sentence() == "1.010x (1.009x to 1.011x)"


def test_what_is_equal_says_within_what() -> None:
    equal = judged([0.001, -0.002, 0.003, -0.001, 0.0, 0.002, -0.003, 0.001])
    assert (equal.outcome, equal.settled, equal.sentence()) == ("equal", True, "equal within 3 %")
    assert judged([0.001, -0.002, 0.003, -0.001, 0.0, 0.002, -0.003, 0.001], margin=0.001).outcome == "undecided"


def test_equal_does_not_stop_measuring_until_a_part_of_the_margin_would_be_seen() -> None:
    near = judged([0.02, -0.02] * 6)
    assert (near.outcome, near.settled) == ("equal", False)
    assert near.visible > 0.4 * near.margin


def test_what_is_undecided_says_what_could_be_seen_and_what_would_decide() -> None:
    torn = judged([0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1], spent_s=10.0)
    assert (torn.outcome, torn.settled) == ("undecided", False)
    assert torn.visible == pytest.approx(math.expm1(0.1))
    factor = (0.1 / math.log(1.03)) ** 2
    assert torn.factor == pytest.approx(factor)
    assert torn.needed_s == pytest.approx(10 * (factor - 1))
    assert torn.sentence() == (
        "undecided: 0.90x to 1.11x (this run could have seen 11 %, "
        "deciding needs about 11 times the samples, 100 s more)"
    )


def test_five_pairs_decide_nothing() -> None:
    five = judged([math.log(2)] * 5)
    assert (five.outcome, five.factor) == ("undecided", 2.0)
    assert five.sentence().startswith("too few rounds: ")  # and not undecided, beside an interval that excludes 1
    assert judged([math.log(2)] * 6).outcome == "slower"
    assert judged([0.0] * 5).outcome == "undecided"


def test_no_margin_is_no_judgement() -> None:
    with pytest.raises(BadInput, match="margin"):
        judged([0.0] * 8, margin=0.0)


# Looks


def test_the_looks_spend_the_stated_error_between_them() -> None:
    assert sum(look.alpha for look in LOOKS) == pytest.approx(0.05)
    assert [look.share for look in LOOKS] == [0.125, 0.25, 0.5, 1.0]
    interval = ratio(np.exp(np.linspace(-0.1, 0.1, 30)), np.ones(30), look=LOOKS[0]).interval
    assert (interval.looks, interval.confidence >= 0.95) == (4, True)


def test_a_first_look_at_too_few_pairs_decides_nothing() -> None:
    """Eight pairs attain 2 / 2^8 = 0.0078, more than the 0.005 that the first look may spend; nine do not."""
    eight, nine = (judge(ratio([2.0] * n, [1.0] * n, look=LOOKS[0])) for n in (8, 9))
    assert eight.ratio.interval.confidence == pytest.approx(1 - (0.045 + 2 / 2**8))
    assert (eight.outcome, nine.outcome) == ("undecided", "slower")


NAIVE = tuple(Look(share=look.share, alpha=0.05) for look in LOOKS)


@pytest.mark.parametrize("noise", NOISES)
def test_equals_differ_no_more_often_than_stated_and_looking_without_spending_does(noise: str) -> None:
    runs, told_apart, naively = 500, 0, 0
    for run in range(runs):
        a, b = pairs(NOISES[noise], np.random.default_rng(run), 64)
        told_apart += compared(a, b)[0].differs
        naively += compared(a, b, NAIVE)[0].differs
    assert told_apart / runs < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert naively / runs > 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


# Processes and trends


def test_processes_that_vary_give_students_interval_of_their_medians() -> None:
    found = estimate_across([summarise([m - 1e-6, m, m, m, m, m + 1e-6]) for m in (1.0, 1.1, 1.2)])
    assert found.median == pytest.approx(1.1)
    assert found.interval.high - 1.1 == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-4)
    assert (found.interval.kind, found.n) == ("across processes", 18)


def test_processes_that_agree_keep_the_interval_of_their_samples() -> None:
    one = ratio(np.exp(AFTER), np.exp(BEFORE))
    found = ratio_across([one] * 4)
    assert found.value == pytest.approx(one.value)
    width = math.log(one.interval.high / one.interval.low)
    assert math.log(found.interval.high / found.interval.low) == pytest.approx(width / 2)
    assert found.n == 36


def test_two_processes_do_not_show_how_processes_vary() -> None:
    with pytest.raises(BadInput, match="2 processes"):
        estimate_across([summarise([1.0] * 6)] * 2)


def test_a_drift_is_found_with_its_size() -> None:
    noise = np.random.default_rng(3).normal(0, 0.01, 200)
    rising = trend(np.exp(np.linspace(0, math.log(1.1), 200) + noise))
    assert rising.drifts
    assert rising.change == pytest.approx(0.1, abs=0.01)
    assert rising.interval.low < 0.1 < rising.interval.high
    assert not trend(np.exp(noise)).drifts
    assert trend([1.0, 2.0, 4.0, 8.0, 16.0]).change == pytest.approx(15)
