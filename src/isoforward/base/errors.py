"""What a command says, and the code it exits with, when it cannot go on.

0 done · 2 bad input · 3 integrity · 4 non-finite · 5 storage · 130 SIGINT · 143 SIGTERM
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class Refusal(Exception):
    """A mistake that the user can mend: one or two lines that name the key or file and the way out."""

    exit_code = 2


class BadInput(Refusal, ValueError):
    """A value, key or file that cannot be used as asked."""


class Integrity(Refusal):
    """A file is not what it says it is."""

    exit_code = 3


class NonFinite(Refusal):
    """The loss or the weights stopped being numbers."""

    exit_code = 4


class StorageFailed(Refusal):
    """Something could not be written; what was there before still is."""

    exit_code = 5


class Stopped(Refusal):
    """A signal ended the run; what it had done is kept."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """The nearest of `known`, for a message; nothing where none is near."""
    near = get_close_matches(value, known, n=1)
    return f"did you mean {near[0]}? " if near else ""
