"""Sections of an export's card."""

from isoforward.show.compare import compare
from isoforward.show.model_card import about_costs, about_text, about_training
from tests.show.planted import PLANTED


def test_what_is_not_known_of_the_training_is_left_out() -> None:
    assert about_training({"steps": 700, "seed": None}) == "## How it was trained\n\n- steps: 700\n"


def test_the_costs_are_those_of_the_rows_and_say_where_they_hold() -> None:
    results = PLANTED
    run = compare(results)
    text = about_costs(
        run.__class__(**{**vars(run), "conditions": {"dtype": "fp32", "batch": 2, "length": 5}}),
        {"cpu": "c", "threads": 2, "torch": "2.13"},
    )
    assert run.headline in text
    assert "| training | backward | 2.00 s | 200 ms | 200 | 900 B |" in text
    assert "Measured on c, 2 threads, torch 2.13, in fp32: training on 2 x 5 tokens" in text
    assert "Take these numbers with care: planted" in text


def test_a_sample_cannot_end_its_own_block() -> None:
    text = about_text("Q", "before ``` after")
    assert text.count("```") == 2
    assert "before ~~~ after" in text
