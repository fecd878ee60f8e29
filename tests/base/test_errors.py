"""The exit codes that scripts rely on."""

import pytest

from isoforward.base.errors import BadInput, Integrity, NonFinite, Refusal, Stopped, StorageFailed


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (BadInput("key"), 2),
        (Integrity("file"), 3),
        (NonFinite("loss"), 4),
        (StorageFailed("disk"), 5),
        (Stopped(2, "interrupted"), 130),
        (Stopped(15, "terminated"), 143),
    ],
)
def test_every_refusal_has_its_exit_code_and_its_message(refusal: Refusal, code: int) -> None:
    assert refusal.exit_code == code
    assert str(refusal) == refusal.args[0]


def test_bad_input_is_a_value_error_too() -> None:
    """A validator in a dataclass may raise it, and callers from Python may catch it as they are used to."""
    with pytest.raises(ValueError, match="write"):
        raise BadInput("write model.layers=1")
