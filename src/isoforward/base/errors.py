"""What a command says, and the code it exits with, when it cannot go on.

0 done · 2 bad input · 3 integrity · 4 non-finite · 5 storage · 130 SIGINT · 143 SIGTERM
"""


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
