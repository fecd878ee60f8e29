"""Samples -> estimate -> ratio -> judgement, with a stated error rate that survives looking while measuring.

The tests in tests/base/test_statistics_simulated.py simulate each rate stated here, for noise as machines make it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from isoforward.base.distributions import Array, binomial_cut, kendall_cut, signed_rank_cut, student, walsh
from isoforward.base.errors import BadInput

Samples: TypeAlias = Sequence[float] | Array

CONFIDENCE = 0.95
FEWEST = 5
MARGIN = 0.03  # relative difference below which two things count as equal
KINDS = (
    "order statistics",
    "batched order statistics",
    "signed rank",
    "signed rank and sign test",  # they disagreed: from the lower low to the higher high
    "medians apart",  # of an unpaired ratio
    "Theil-Sen",
    "across processes",
    "range",  # smallest to largest: too few samples for anything narrower
    "errors of like predictions",  # of a prediction: as far as others of its kind were off
)
OUTCOMES = ("faster", "slower", "equal", "undecided")
FEWEST_IN_BATCHES = 24


@dataclass(frozen=True, kw_only=True)
class Interval:
    low: float
    high: float
    kind: str  # one of KINDS
    confidence: float  # over all planned looks together
    looks: int = 1

    @property
    def reached(self) -> bool:
        return self.confidence >= CONFIDENCE - 1e-9


@dataclass(frozen=True, kw_only=True)
class Look:
    """One of the planned looks at samples that are still coming in, and the error it may spend.

    By the union bound the intervals of all looks hold at once with probability 1 - total, whenever measuring stops.
    """

    share: float = 1.0  # of the budget, at which the look is taken
    alpha: float = 1 - CONFIDENCE
    total: float = 1 - CONFIDENCE
    count: int = 1

    def interval(self, low: float, high: float, kind: str, error: float) -> Interval:
        """`error` is what the interval attains: above `alpha` if there are too few samples."""
        confidence = 1 - (self.total - self.alpha + error)
        return Interval(low=low, high=high, kind=kind, confidence=confidence, looks=self.count)


ONE_LOOK = Look()
# Half-widths of 2.8, 2.6, 2.6 and 2.2 standard errors; those of the always-valid normal mixture (Howard and others
# 2021) are 3.0 at the one n it is tuned for, more elsewhere.
LOOKS = tuple(Look(share=s, alpha=a, count=4) for s, a in ((1 / 8, 0.005), (1 / 4, 0.01), (1 / 2, 0.01), (1, 0.025)))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    median: float
    interval: Interval
    samples: tuple[float, ...]  # outliers among them

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def precision(self) -> float:
        """Half the interval's width, relative to the median."""
        half = (self.interval.high - self.interval.low) / 2
        return half / abs(self.median) if self.median else math.inf

    def known(self, precision: float) -> bool:
        """Whether measuring may stop: CONFIDENCE is reached, to this relative half-width."""
        return self.precision <= precision and self.interval.reached


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of the first's samples to the second's: below 1 the first needs less."""

    value: float
    interval: Interval
    n: int

    @property
    def low(self) -> float:
        return self.interval.low

    @property
    def high(self) -> float:
        return self.interval.high

    def inverse(self) -> Ratio:
        """Of the second's samples to the first's."""
        turned = replace(self.interval, low=1 / self.interval.high, high=1 / self.interval.low)
        return replace(self, value=1 / self.value, interval=turned)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    outcome: str  # one of OUTCOMES: the first, seen from the second
    ratio: Ratio
    margin: float
    visible: float  # the smallest relative difference that this run could have seen: the interval's half-width
    factor: float | None  # about how many times the samples would decide, if the ratio stays; None when decided
    needed_s: float | None  # the same in further seconds, where the time spent was given

    @property
    def differs(self) -> bool:
        return self.outcome in ("faster", "slower")

    @property
    def told(self) -> str:
        """The outcome in words: no interval of so few rounds could have decided, wherever it lies."""
        few = self.outcome == "undecided" and not self.ratio.interval.reached
        return "too few rounds" if few else self.outcome

    @property
    def settled(self) -> bool:
        """Whether measuring may stop before the budget is spent.

        Equal settles only once 0.4 of the margin is visible: the first interval that lies inside the margin would often
        end a comparison whose difference, of half the margin or more, further samples would show.
        """
        return self.differs or (self.outcome == "equal" and self.visible <= 0.4 * self.margin)

    def sentence(self) -> str:
        low, high = self.ratio.interval.low, self.ratio.interval.high
        digits = _digits(self.ratio.value, (high - low) / 2)
        value, low_x, high_x = (f"{number:.{digits}f}x" for number in (self.ratio.value, low, high))
        if self.differs:
            return f"{value} ({low_x} to {high_x})"
        if self.outcome == "equal":
            return f"equal within {_short(100 * self.margin)} %"
        assert self.factor is not None
        more = f"about {_short(self.factor)} times the samples"
        if self.needed_s is not None:
            more += f", {_short(self.needed_s)} s more"
        seen = f"this run could have seen {_short(100 * self.visible)} %"
        return f"{self.told}: {low_x} to {high_x} ({seen}, deciding needs {more})"


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Relative change from the first to the last sample: 0.02 is 2 % more at the end."""

    change: float
    interval: Interval

    @property
    def drifts(self) -> bool:
        return not self.interval.low <= 0 <= self.interval.high


def summarise(samples: Samples, *, look: Look = ONE_LOOK) -> Estimate:
    """Median of samples in the order they were taken.

    Its interval is two order statistics with binomial ranks (Conover, Practical Nonparametric Statistics, 3.2). From
    FEWEST_IN_BATCHES samples on, ranks are also had from how the share above the median varies between consecutive
    batches (Student's t; sectioning: Asmussen and Glynn, Stochastic Simulation, III.5), and the wider interval is
    shown. That holds to within a point for samples which keep up to 0.6 of the one before, at 15 to 30 % more width
    for independent ones. Fewer samples are taken for independent.
    """
    values = _checked(samples)
    n = len(values)
    ordered = np.sort(values)
    median = float(np.median(ordered))
    k, error = binomial_cut(n, look.alpha)
    kind = "order statistics"
    if n >= FEWEST_IN_BATCHES:
        count = _batches(n)
        above = np.array([np.mean(np.sign(batch - median)) for batch in np.array_split(values, count)]) / 2
        half = student(1 - look.alpha / 2, count - 1) * float(np.std(above, ddof=1)) / math.sqrt(count)
        batched = math.floor(n * (0.5 - half) - 0.5)
        if batched < k:
            k, kind, error = max(batched, 0), "batched order statistics", look.alpha
    interval = look.interval(float(ordered[k]), float(ordered[-1 - k]), kind if k else "range", error)
    return Estimate(median=median, interval=interval, samples=tuple(values.tolist()))


def ratio(first: Samples, second: Samples, *, covariate: Samples | None = None, look: Look = ONE_LOOK) -> Ratio:
    """Of pairs whose two samples ran one directly after the other, the order within each drawn by a fair coin.

    Then a pair of equals has a log ratio of either sign with the same chance, whatever the noise does (drift, bursts,
    autocorrelation, the second place being faster), and the signed-rank test is exact by that randomisation alone. The
    value is the Hodges-Lehmann estimate, the interval the inverted test (Hollander, Wolfe and Chicken, Nonparametric
    Statistical Methods, 3.1 to 3.3). The inverted sign test checks it: where that excludes the value, the log ratios
    are not symmetric (the order was not drawn, or the effect is not one factor), and the hull of both is shown.

    `covariate` is one number a pair whose sign the drawn order decides, so that it is 0 on average: 1 where the first
    of the two ran first, else -1; or the log ratio of a reference timed right before each. What it explains by least
    squares is taken out.
    """
    a, b = _positive(first), _positive(second)
    if len(a) != len(b):
        raise BadInput(f"{len(a)} and {len(b)} samples cannot be paired; measure both in the same rounds")
    logs = np.log(a / b)
    if covariate is None:
        return _centre(logs, np.ones(len(logs)), look)
    if len(covariate) != len(a):
        raise BadInput(f"{len(covariate)} numbers are no covariate of {len(a)} pairs; give one a pair")
    c = _checked(covariate)
    far = 3 * float(np.median(np.abs(c))) or math.inf
    c = np.clip(c, -far, far)
    squares = float(c @ c) or 1.0
    # Through the origin, so that swapping a pair changes neither the slope nor the size of a residual, and the test of
    # each effect stays exact. The slope is that of (logs - effect): an effect is weighed as its own residual is.
    weights = np.maximum(1 - c * (float(c.sum()) / squares), 0.1)
    return _centre(logs - c * (float(c @ logs) / squares), weights, look)


def ratio_unpaired(first: Samples, second: Samples) -> Ratio:
    """Of medians of samples that were not taken in pairs; drift between them is not seen."""
    return ratio_of(summarise(_positive(first)), summarise(_positive(second)))


def ratio_of(one: Estimate, two: Estimate) -> Ratio:
    """Of estimates that were made apart, such as two runs' files.

    The interval joins both (MOVER: Zou and Donner 2008): in logs, each half-width is the root of the sum of squares of
    one's lower and the other's upper.
    """
    (a, a_low, a_high), (b, b_low, b_high) = (np.log((e.median, e.interval.low, e.interval.high)) for e in (one, two))
    below, above = math.hypot(a - a_low, b_high - b), math.hypot(a_high - a, b - b_low)
    low, value, high = (math.exp(log) for log in (a - b - below, a - b, a - b + above))
    confidence = min(one.interval.confidence, two.interval.confidence)
    interval = Interval(low=low, high=high, kind="medians apart", confidence=confidence, looks=one.interval.looks)
    return Ratio(value=value, interval=interval, n=min(one.n, two.n))


def judge(ratio: Ratio, *, margin: float = MARGIN, spent_s: float | None = None) -> Judgement:
    """Differs where the interval excludes 1, else equal where it lies inside the margin, else undecided.

    The second is two one-sided tests (Berger and Hsu 1996), each at half the interval's error. At most 1 - CONFIDENCE
    of the time do equals differ, or are things equal that are further apart than `margin`; with less confidence than
    that nothing is decided.
    """
    if margin <= 0:
        raise BadInput(
            f"margin={margin} leaves no room to be equal in; give a relative difference above 0, such as 0.03"
        )
    value, low, high = (math.log(number) for number in (ratio.value, ratio.interval.low, ratio.interval.high))
    half, bound = (high - low) / 2, math.log1p(margin)
    reached = ratio.interval.reached
    outcome = "undecided"
    if reached and not low <= 0 <= high:
        outcome = "slower" if low > 0 else "faster"
    elif reached and -bound <= low and high <= bound:
        outcome = "equal"
    factor = needed_s = None
    if outcome == "undecided":  # half-widths shrink as 1 / sqrt(n): until 0 is outside, or until the bound is
        ways = [gap for gap in (abs(value), bound - abs(value)) if gap > 0]
        factor = max((half / max(ways)) ** 2, 1.1 if reached else 2.0)
        needed_s = None if spent_s is None else spent_s * (factor - 1)
    return Judgement(
        outcome=outcome, ratio=ratio, margin=margin, visible=math.expm1(half), factor=factor, needed_s=needed_s
    )


def estimate_across(estimates: Sequence[Estimate]) -> Estimate:
    """Of one thing measured in at least 3 processes: mean of their medians, with the variance between processes."""
    middles = [e.median for e in estimates]
    low, middle, high = _across(middles, [(e.interval.high - e.interval.low) / 2 for e in estimates])
    interval = ONE_LOOK.interval(low, high, "across processes", ONE_LOOK.alpha)
    return Estimate(median=middle, interval=interval, samples=tuple(sample for e in estimates for sample in e.samples))


def ratio_across(ratios: Sequence[Ratio]) -> Ratio:
    """Of one comparison made in at least 3 processes: geometric mean, with the variance between processes."""
    logs = [math.log(r.value) for r in ratios]
    low, middle, high = _across(logs, [math.log(r.interval.high / r.interval.low) / 2 for r in ratios])
    return _from_logs(low, middle, high, "across processes", ONE_LOOK.alpha, sum(r.n for r in ratios), ONE_LOOK)


def trend(samples: Samples) -> Trend:
    """Drift over a run: Theil-Sen slope of the logs of batch medians, with Kendall's exact interval.

    Batches bring down the autocorrelation, which the interval does not know of: of samples that keep 0.6 of the one
    before, 50 are needed for its level.
    """
    values = np.log(_positive(samples))
    batches = np.array_split(np.arange(len(values)), min(_batches(len(values)), len(values)))
    when = np.array([np.mean(batch) for batch in batches]) / (len(values) - 1)
    what = np.array([np.median(values[batch]) for batch in batches])
    i, j = np.triu_indices(len(batches), 1)
    slopes = np.sort((what[j] - what[i]) / (when[j] - when[i]))
    k, error = kendall_cut(len(batches), ONE_LOOK.alpha)
    change, low, high = (float(c) for c in np.expm1((np.median(slopes), slopes[k], slopes[-1 - k])))
    return Trend(change=change, interval=ONE_LOOK.interval(low, high, "Theil-Sen", error))


def _batches(n: int) -> int:
    """Long ones keep less of the one before, many give a steadier variance."""
    return 12 if n >= 144 else 8


def _across(middles: Sequence[float], halves: Sequence[float]) -> tuple[float, float, float]:
    """Low, mean and high: Student's t over processes, or their own half-widths pooled, the wider of the two."""
    count = len(middles)
    if count < 3:
        raise BadInput(f"{count} processes do not show how much processes vary; take at least 3")
    between = student(1 - ONE_LOOK.alpha / 2, count - 1) * float(np.std(middles, ddof=1)) / math.sqrt(count)
    half = max(between, math.hypot(*halves) / count)
    middle = math.fsum(middles) / count
    return middle - half, middle, middle + half


def _from_logs(low: float, middle: float, high: float, kind: str, error: float, n: int, look: Look) -> Ratio:
    return Ratio(value=math.exp(middle), interval=look.interval(math.exp(low), math.exp(high), kind, error), n=n)


def _centre(logs: Array, weights: Array, look: Look) -> Ratio:
    ordered, n = np.sort(logs / weights), len(logs)
    count = n * (n + 1) // 2
    k, error = signed_rank_cut(n, look.alpha)
    low, lower, upper, high = walsh(logs, weights, (k, (count - 1) // 2, count // 2, count - 1 - k))
    value, kind = (lower + upper) / 2, "signed rank" if k else "range"
    rank, _ = binomial_cut(n, look.alpha)
    if not ordered[rank] <= value <= ordered[-1 - rank]:
        low, high = min(low, float(ordered[rank])), max(high, float(ordered[-1 - rank]))
        kind = "signed rank and sign test"
    return _from_logs(low, value, high, kind, error, n, look)


def _short(number: float) -> str:
    """Two significant digits, never 1e+02."""
    return f"{float(f'{number:.2g}'):.12g}"


def _digits(value: float, half: float) -> int:
    """Decimals that show three digits of the value, and more where the interval is narrower."""
    narrow = math.ceil(-math.log10(half)) if half > 0 else 0
    return min(max(2 - round(math.log10(value)), narrow, 0), 6)


def _positive(samples: Samples) -> Array:
    values = _checked(samples)
    if values.min() <= 0:
        raise BadInput("a ratio needs samples above 0: a part that did not run is absent, not 0")
    return values


def _checked(samples: Samples) -> Array:
    if len(samples) < FEWEST:
        raise BadInput(f"{len(samples)} samples are too few to compare or to give an interval; take at least {FEWEST}")
    values = np.asarray(samples, dtype=np.float64)
    if not np.isfinite(values).all():
        raise BadInput(f"sample {int(np.argmin(np.isfinite(values))) + 1} of {len(values)} is not a finite number")
    return values
