"""Plays as plain text, and sources that say what they lack."""

import pytest

from isoforward.data.sources import HELD_OUT_PLAYS, play_text


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("## ACT I\n", "ACT I\n"),
        ("**ROMEO:**\nBut, soft!\n", "ROMEO:\nBut, soft!\n"),
        ("**ROMEO**\nBut, soft!\n", "ROMEO:\nBut, soft!\n"),
        ("_Exit ROMEO_\n", "[Exit ROMEO]\n"),
        ("He jests — at scars &amp; wounds\n", "He jests -- at scars & wounds\n"),
        ("one  \n\n\n\n\ntwo", "one\n\ntwo\n"),
    ],
)
def test_a_play_becomes_plain_text(markdown: str, text: str) -> None:
    assert play_text(markdown) == text


def test_one_play_of_each_genre_is_held_out() -> None:
    genres = [play.partition("/")[0] for play in HELD_OUT_PLAYS]
    assert len(set(genres)) == len(genres) == 6
