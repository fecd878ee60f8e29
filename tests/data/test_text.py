"""Blocks of bytes to text; which places are named is in test_corpus.py and test_files.py."""

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoforward.data import text
from isoforward.data.text import NotText, cleaned, decoded, pieces

PLAIN = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(PLAIN, st.integers(1, 9))
def test_blocks_of_any_size_are_the_text_that_a_row_of_it_is(whole: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", max(block, 4))  # a mark is looked for in the first
        assert "".join(decoded(io.BytesIO(whole.encode()))) == cleaned(whole)


@given(PLAIN, st.lists(st.integers(0, 40)), st.integers(2, 9))
def test_pieces_depend_on_no_block_and_are_the_text(whole: str, cuts: list[int], longest: int) -> None:
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    blocks = [whole[start:end] for start, end in pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", longest)
        *found, end = pieces(blocks)
        assert [*found, end] == [*pieces([whole])]
    assert end is None and "".join(str(piece) for piece in found) == whole
    assert all(0 < len(str(piece)) <= longest for piece in found)


@pytest.mark.parametrize(
    ("value", "said"), [(1, "holds a number"), ({}, "holds an object"), (b"\xff", "not UTF-8 at byte 0")]
)
def test_what_is_no_text_says_so(value: object, said: str) -> None:
    with pytest.raises(NotText, match=said):
        cleaned(value)
