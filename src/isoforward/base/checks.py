"""What a key may be, said where it is declared. BadInput names the key, and what would do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import ClassVar, TypeVar

from isoforward.base.errors import BadInput, did_you_mean

T = TypeVar("T")

LARGEST = 2**21  # no real model has more positions, tokens, layers or features, and no batch more sequences
UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def key(default: T, check: Callable[..., object], *limits: object) -> T:
    """A field of a Checked dataclass: `check(name, value, *limits)` raises where the value will not do."""
    return field(default=default, metadata={"check": (check, limits)})


class Checked:
    """A dataclass whose fields are checked as it is built; None is "not set" and passes."""

    prefix: ClassVar[str] = ""  # stands before its keys, as they are typed

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]  # of the dataclass that it is
            value = getattr(self, each.name)
            if value is not None and "check" in each.metadata:
                check, limits = each.metadata["check"]
                check(self.prefix + each.name, value, *limits)


def unknown(key: str, value: str, allowed: Sequence[str]) -> BadInput:
    hint = did_you_mean(value, allowed)
    return BadInput(f"{key}={value} is not known: {hint}choose one of {', '.join(allowed)}")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise unknown(key, str(value), allowed)


def at_least(key: str, value: float | None, least: float) -> None:
    """None passes; NaN never does, nor what no float or 64 bits hold."""
    if value is not None and not least <= value < 2**53:
        more = " and below 2^53" if value >= least else ""
        raise BadInput(f"{key}={value} must be a finite number of at least {least:g}{more}")


def sized(key: str, value: int | None, least: int = 1) -> None:
    at_least(key, value, least)
    if value is not None and value > LARGEST:
        raise BadInput(f"{key}={value} is more than any has; it can be {LARGEST} at most")


def within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"{key}={value} must lie between {low:g} and {high:g}")


def positive(key: str, value: float, below: float = math.inf) -> None:
    if not 0 < value < below:
        raise BadInput(f"{key}={value} must be a positive number")


def duration_s(key: str, text: str) -> int:
    """2h, 90m, 1h30m, 45s, HH:MM:SS, and days before it as DD:HH:MM:SS or, as Slurm has it, D-HH:MM:SS."""
    if re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text):
        seconds = sum(int(number) * UNITS_S[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
    elif clock := re.fullmatch(r"(?:(\d+)[:-])?(\d+):(\d+):(\d+)", text):
        seconds = sum(int(number or 0) * unit for number, unit in zip(clock.groups(), UNITS_S.values(), strict=True))
    else:
        seconds = 0
    if not 0 < seconds < 2**31:
        raise BadInput(f"{key}={text} is no duration; write 2h, 90m, 1h30m, HH:MM:SS or DD:HH:MM:SS")
    return seconds
