"""Quantities as people read them. Everywhere else they are seconds, bytes and counts."""

from __future__ import annotations

import math

TIME = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
SIZE = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
COUNT = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))

NEAR = 0.01  # to 1
SMALL = 1e-4  # a number below it is written with its power of ten


def digits(value: float) -> str:
    """Three significant ones."""
    if value == 0:
        return "0"
    if abs(value) < SMALL:
        return f"{value:.2e}"
    value = float(f"{value:.3g}") if abs(value) < 1000 else value  # 0.9996 is 1.00
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def scaled(value: float, steps: tuple[tuple[float, str], ...], suffix: str = "") -> str:
    size, name = next((step for step in steps if abs(value) >= step[0] * 0.9995), steps[-1])
    return f"{digits(value / size)} {name}{suffix}".rstrip()


def seconds(value: float) -> str:
    if abs(value) >= 120:
        return f"{value / 3600:.1f} h" if abs(value) >= 7200 else f"{value / 60:.1f} min"
    return scaled(value, TIME)


def size(value: float) -> str:
    return scaled(value, SIZE)


def count(value: float, suffix: str = "") -> str:
    return scaled(value, COUNT, suffix)


def several(number: int, noun: str) -> str:
    """1 token, 1,024 tokens"""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def times(value: float) -> str:
    return f"{digits(value)}x"


def near_one(value: float) -> str:
    """A ratio; by its distance from 1 where its digits would hide that."""
    apart = value - 1
    return digits(value) if not 0 < abs(apart) < NEAR else f"1 {'+' if apart > 0 else '-'} {abs(apart):.1e}"


def quantity(value: float | None, unit: str) -> str:
    """By the unit of a row."""
    if value is None:
        return "unavailable"
    if unit == "s":
        return seconds(value)
    if unit == "byte":
        return size(value)
    if unit == "token" and value == int(value):
        return several(int(value), unit)
    if unit == "x" and 0 < abs(value - 1) < NEAR:
        return near_one(value)
    if " " in unit:  # words, which no prefix belongs to
        return f"{count(value)} {unit}"
    return count(value, {"flop": "FLOP", "byte/s": "B/s", "flop/s": "FLOP/s", "joule": "J"}.get(unit, unit))
