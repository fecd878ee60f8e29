"""Messages between processes."""

from __future__ import annotations

import pytest

from isoforward.plan.collectives import all_reduce, latency_and_rate


def test_latency_and_bandwidth_of_messages_are_found_again_where_both_were_planted() -> None:
    sent = [1e3, 1e5, 1e7]
    latency_s, byte_s = latency_and_rate(sent, [1e-4 + size / 2e9 for size in sent])
    assert (latency_s, 1 / byte_s) == (pytest.approx(1e-4), pytest.approx(2e9))


@pytest.mark.slow
def test_an_all_reduce_is_timed_between_two_processes() -> None:
    found = all_reduce()
    assert found is not None
    assert found["bytes_per_s"] > 1e6
