"""Quantities as people read them."""

import pytest

from isoforward.base import units


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (123.4, "123"),
        (12345.0, "12,345"),
        (0.00123, "0.00123"),
        (2.346e-6, "2.35e-06"),
    ],
)
def test_a_number_has_three_significant_digits(value: float, said: str) -> None:
    assert units.digits(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0588, "58.8 ms"),
        (2.6e-5, "26.0 µs"),
        (0.0009996, "1.00 ms"),
        (119.0, "119 s"),
        (150.0, "2.5 min"),
        (7200.0, "2.0 h"),
    ],
)
def test_a_time_is_said_in_the_unit_that_fits(value: float, said: str) -> None:
    assert units.seconds(value) == said


def test_sizes_go_by_1024_and_counts_by_1000() -> None:
    assert units.size(102 * 2**20) == "102 MiB"
    assert units.size(512) == "512 B"
    assert units.count(4.83e9) == "4.83 G"
    assert units.count(2e12, "FLOP") == "2.00 TFLOP"
    assert units.times(14.1) == "14.1x"


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (None, "s", "unavailable"),
        (0.5, "s", "500 ms"),
        (1024.0, "byte", "1.00 KiB"),
        (3e9, "flop/s", "3.00 GFLOP/s"),
        (2.0, "joule", "2.00 J"),
        (3.0, "token", "3 tokens"),
        (29_900.0, "differing logits", "29.9 k differing logits"),
        (0.0, "in 1000", "0 in 1000"),
    ],
)
def test_a_quantity_is_said_by_the_unit_of_its_row(value: float | None, unit: str, said: str) -> None:
    assert units.quantity(value, unit) == said


def test_a_ratio_near_1_shows_its_distance() -> None:
    found = [units.quantity(value, "x") for value in (1 + 3.2e-6, 1 - 4e-3, 1.0, 1.5)]
    assert found == ["1 + 3.2e-06", "1 - 4.0e-03", "1.00 x", "1.50 x"]


def test_tokens_that_are_whole_are_counted() -> None:
    assert [units.quantity(value, "token") for value in (4.0, 1.0, 2.5)] == ["4 tokens", "1 token", "2.50 token"]
