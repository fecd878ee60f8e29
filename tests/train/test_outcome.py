import math
from dataclasses import replace

import pytest

from isoforward.train.outcome import Outcome

OUTCOME = Outcome(
    steps=1200, tokens_per_step=2048, loss=math.log(8), judged_tokens=4096, bytes_per_token=2.0, tokens_per_s=9876.5
)


def test_a_loss_of_three_bits_a_token_of_two_bytes() -> None:
    assert OUTCOME.bits_per_byte == pytest.approx(1.5)
    assert OUTCOME.perplexity == pytest.approx(8.0)
    assert OUTCOME.told_loss() == "2.079 nats/token 1.500 bits/byte, perplexity 8"
    assert OUTCOME.told_steps() == "1,200 steps, 9,876 tokens/s"
    assert (
        replace(OUTCOME, ended_by="trainer.max_time").told_steps().startswith("1,200 steps, ended by trainer.max_time")
    )


def test_rows_and_numbers_are_the_same() -> None:
    rows = {row.quantity: row.value for row in OUTCOME.rows("here", text="abc")}
    numbers = OUTCOME.numbers()
    assert rows == {
        "loss": numbers["validation_loss"],
        "bits_per_byte": numbers["bits_per_byte"],
        "throughput": numbers["tokens_per_s"],
    }


def test_what_is_not_known_is_unavailable_with_a_reason_and_no_number() -> None:
    unknown = replace(OUTCOME, loss=None, tokens_per_s=None)
    assert {row.provenance for row in unknown.rows("here", text="abc")} == {"unavailable"}
    assert unknown.numbers() == {"steps": 1200.0}
    assert unknown.told_loss() == "not validated"
