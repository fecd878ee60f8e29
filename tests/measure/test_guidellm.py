"""Reading what guidellm 0.8.1 wrote, and a load by it where `make load` has set it up."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from isoforward.base.errors import BadInput
from isoforward.measure import guidellm
from isoforward.measure.guidellm import answers_of
from isoforward.measure.load import Endpoint, Question
from tests.measure.test_load import endpoint  # noqa: F401 - the planted server

BEGAN = 1795820535.0


def request(due_s: float, status: str = "completed", tokens: int | None = 5, **more: Any) -> dict[str, Any]:
    """The keys that are read, of those that it writes."""
    timings: dict[str, Any] = {
        "targeted_start": BEGAN + due_s,
        "first_token_iteration": BEGAN + due_s + 0.25,
        "last_token_iteration": BEGAN + due_s + 1.25,
        "request_end": BEGAN + due_s + 1.5,
    }
    info = {"status": status, "error": "503 Service Unavailable" if status == "errored" else None}
    info["timings"] = timings | more  # type: ignore[assignment]
    found = {"info": info, "output_tokens": tokens or 2, "output_metrics": {"text_tokens": tokens}, "prompt_tokens": 7}
    return found | {"request_args": json.dumps({"body": {"prompt": "answer please"}})}


def report(*answered: dict[str, Any], errored: Any = (), incomplete: Any = None) -> Any:
    requests = {"successful": list(answered), "errored": list(errored), "incomplete": incomplete}
    return {"benchmarks": [{"scheduler_state": {"start_time": BEGAN}, "requests": requests}]}


def questions(n: int, words: str = "answer please") -> list[Question]:
    return [Question(prompt=words, new_tokens=5) for _ in range(n)]


def test_times_count_from_when_a_request_was_due() -> None:
    found = answers_of(report(request(2.0), request(1.0)), questions(2), 60.0)
    assert found is not None
    assert [answer.due_s for answer in found] == [1.0, 2.0]
    assert (found[0].ttft_s, found[0].tpot_s, found[0].whole_s) == (0.25, 0.25, 1.5)
    assert found[0].itl_s == pytest.approx([0.25] * 4)
    assert (found[0].prompt_tokens, found[0].new_tokens) == (7, 5)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (request(1.0, "errored"), "503 Service Unavailable"),
        (request(1.0, "cancelled"), "not done when the load ended"),
        (request(1.0, first_token_iteration=None), "an answer without a token"),
        (request(1.0, tokens=None), "the stream ended before the answer"),
        (request(1.0, request_end=BEGAN + 9.0), "not done within 5 s"),
    ],
)
def test_what_is_no_answer_is_a_failure(one: dict[str, Any], said: str) -> None:
    (found,) = answers_of(report(one), questions(1), 5.0) or []
    assert found.failure == said


def test_of_a_server_that_counts_nothing_an_answer_is_whole_with_all_its_pieces() -> None:
    """And a prompt as long as it was when it was asked."""
    silent = request(1.0) | {"output_metrics": {"text_tokens": None}, "prompt_tokens": None}
    asked = [Question(prompt="answer please", prompt_tokens=3, new_tokens=5)]
    assert [(one.prompt_tokens, one.new_tokens) for one in answers_of(report(silent), asked, 5.0) or []] == [(3, 5)]


def test_requests_that_it_never_sent_are_failures_and_those_of_an_unset_clock_no_load() -> None:
    found = answers_of(report(request(1.0), errored=[request(1.5, "errored")]), questions(4), 60.0)
    assert [answer.failure for answer in found or []] == ["", "503 Service Unavailable", "not sent", "not sent"]
    unset = request(1.0, targeted_start=1.699)  # as version 0.8.1 wrote it
    assert answers_of(report(request(1.0), unset), questions(2), 60.0) is None


def test_without_it_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere, at = Endpoint(url="http://host:1", model="m"), {"rate": 1.0, "timeout_s": 1.0, "seed": 0}
    monkeypatch.setattr(guidellm, "program", lambda: None)
    with pytest.raises(BadInput, match="make load sets it up, or write load=own"):
        guidellm.load(nowhere, questions(1), **at)  # type: ignore[arg-type]
    monkeypatch.setattr(guidellm, "program", lambda: "/bin/false")
    with pytest.raises(BadInput, match="wrote no report: exit code 1"):
        guidellm.load(nowhere, questions(1), **at)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(guidellm.program() is None, reason="no guidellm: make load sets it up")
def test_a_planted_server_is_loaded_and_its_failures_are_told(endpoint: Endpoint) -> None:  # noqa: F811
    behaviours = ["answer", "refuse", "break", "answer", "drop", "empty", "answer", "hang"]
    asked = [Question(prompt=f"{behaviour} please", new_tokens=5) for behaviour in behaviours]
    version, found = guidellm.load(endpoint, asked, rate=20.0, timeout_s=3.0, seed=1)
    assert version
    assert len(found) == len(asked)
    good = [answer for answer in found if not answer.failure]
    assert len(good) == behaviours.count("answer")
    assert {(answer.prompt_tokens, answer.new_tokens) for answer in good} == {(7, 5)}
    assert all(answer.ttft_s > 0 and answer.whole_s >= answer.ttft_s for answer in good)
    gaps = [later.due_s - one.due_s for one, later in pairwise(found)]
    assert max(gaps) > 2 * min(gaps)
