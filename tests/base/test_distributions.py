"""Cuts of the rank tests and quantiles, against published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from isoforward.base import distributions
from isoforward.base.distributions import binomial_cut, kendall_cut, signed_rank_cut, student, walsh


@pytest.mark.parametrize(
    ("n", "first", "confidence"),
    [
        (5, 1, 0.9375),
        (6, 1, 0.9688),
        (9, 2, 0.9609),
        (15, 4, 0.9648),
        (20, 6, 0.9586),
        (25, 8, 0.9567),
        (50, 18, 0.9672),
    ],
)
def test_the_sign_test_has_the_published_ranks(n: int, first: int, confidence: float) -> None:
    """Conover, or Hahn and Meeker, Statistical Intervals."""
    k, error = binomial_cut(n, 0.05)
    assert k + 1 == first
    assert 1 - error == pytest.approx(confidence, abs=5e-5)


@pytest.mark.parametrize(
    ("n", "critical"), [(6, 0), (7, 2), (8, 3), (9, 5), (10, 8), (12, 13), (16, 29), (20, 52), (25, 89), (30, 137)]
)
def test_the_signed_rank_test_has_the_published_critical_values(n: int, critical: int) -> None:
    """Two-sided 0.05: Wilcoxon and Wilcox 1964."""
    k, error = signed_rank_cut(n, 0.05)
    assert k == critical
    assert error <= 0.05


def test_the_normal_takes_over_from_the_exact_signed_rank_test_without_a_step() -> None:
    exact, _ = signed_rank_cut(200, 0.05)
    n = 200
    normal = n * (n + 1) / 4 - 1.95996 * math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    assert exact == pytest.approx(normal, abs=2)
    assert signed_rank_cut(201, 0.05)[0] - exact == pytest.approx(87, abs=3)


def test_kendalls_test_has_the_published_critical_value() -> None:
    """Two-sided 0.05 at n=10: concordant less discordant pairs of 23 or more, Kendall 1970. 45 - 2 * 11 = 23."""
    assert kendall_cut(10, 0.05)[0] == 11


@pytest.mark.parametrize(
    ("probability", "dof", "quantile"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 7, 2.365),
        (0.975, 11, 2.201),
        (0.995, 30, 2.750),
        (0.95, 4, 2.132),
    ],
)
def test_student_has_the_published_quantiles(probability: float, dof: int, quantile: float) -> None:
    assert student(probability, dof) == pytest.approx(quantile, abs=5e-4)


def test_counted_walsh_averages_are_those_that_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    values, weights, ranks = draw.normal(size=60), draw.uniform(0.5, 1.5, 60), (0, 5, 900, 1829)
    held = walsh(values, weights, ranks)
    monkeypatch.setattr(distributions, "WALSH_PAIRS", 10)
    assert walsh(values, weights, ranks) == pytest.approx(held)
