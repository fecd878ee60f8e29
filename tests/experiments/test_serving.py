"""The command against the planted server of test_load: what its rows and its sentence say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments.serving import Serving, answer, idle, loaded, main, only_model, quantile, questions, rows, warmed_up
from isoforward.app.command_line import run
from isoforward.base.config import MeasureConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import only, read, select
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export
from isoforward.measure.case import Case
from isoforward.measure.load import Answer, Endpoint, Question
from isoforward.model.gpt import GPT
from isoforward.serve.endpoint import EVERYTHING
from tests import planted as planted_rows
from tests.conftest import tiny
from tests.measure.test_load import endpoint  # noqa: F401 - the planted server


def asked(tmp_path: Path, *overrides: str) -> int:
    """By our own client, unless overrides say otherwise."""
    return run(main, Serving, ["load=own", *overrides, "tracking=none", f"run_dir={tmp_path / 'run'}"])


def planted(due_s: float, ttft_s: float = 0.1, gap_s: float = 0.05, failure: str = "") -> Answer:
    times = tuple(due_s + ttft_s + n * gap_s for n in range(5))
    return Answer(due_s=due_s, token_s=times, end_s=times[-1], prompt_tokens=10, new_tokens=5, failure=failure)


def config(**more: Any) -> Serving:
    return Serving(endpoint="http://host:1", requests=10, **more)


def test_a_failure_stands_in_every_percentile_as_one_that_never_ended() -> None:
    assert quantile([0.1, 0.2, 0.3], 1, 0.50) == 0.2
    assert quantile([0.1, 0.2, 0.3], 1, 0.95) == float("inf")
    answers = [planted(n) for n in range(9)] + [planted(9, ttft_s=0.0, failure="status 503")]
    found = list(rows(answers, config(), 1.0))
    assert only(found, quantity="failed").value == 0.1
    assert only(found, quantity="time to first token", quantile="p50").value == pytest.approx(0.1)
    late = only(found, quantity="time to first token", quantile="p95")
    assert late.value is None
    assert late.reason == "1 of 10 requests failed: status 503"


def test_tokens_goodput_and_money_are_what_a_hand_counts() -> None:
    answers = [planted(n) for n in range(9)] + [planted(9, ttft_s=2.0)]
    found = list(rows(answers, config(price_per_hour=3.6), 1.0))
    span_s = 9 + 2.0 + 4 * 0.05
    assert only(found, quantity="served tokens", phase="decode").value == pytest.approx(50 / span_s)
    assert only(found, quantity="goodput").value == pytest.approx(9 / span_s)  # one came too late
    assert only(found, quantity="money", phase="decode").value == pytest.approx(0.001 * 1e6 * span_s / 50)
    assert only(found, quantity="money", phase="prefill").value == pytest.approx(0.001 * 1e6 * span_s / 100)
    assert only(found, quantity="time per output token", quantile="p50").value == pytest.approx(0.05)


def test_the_break_even_is_the_tokens_served_in_trainings_time_and_only_where_the_objective_is_met() -> None:
    answers = [planted(n) for n in range(10)]
    found = only(rows(answers, config(training_hours=2.0), 1.0), quantity="break-even")
    assert found.value == pytest.approx(2 * 3600 * 150 / answers[-1].end_s)
    assert found.conditions["busy"] == pytest.approx(1 - idle(answers))
    assert not select(rows(answers, config(training_hours=2.0, ttft=0.01), 1.0), quantity="break-even")


def test_idle_is_the_time_in_which_nobody_waited() -> None:
    first = Answer(due_s=1.0, end_s=3.0)
    assert idle([first, Answer(due_s=2.0, end_s=4.0), Answer(due_s=6.0, end_s=8.0)]) == pytest.approx(3 / 8)


def told_of(*loads: list[Answer], **more: Any) -> str:
    placed = [row for n, answers in enumerate(loads, 1) for row in rows(answers, config(**more), float(n))]
    return answer(planted_rows.results_of(placed))


def test_a_goal_that_no_request_met_is_said_so_and_a_single_rate_is_said_once() -> None:
    good = [planted(n) for n in range(10)]
    assert told_of(good, ttft=0.01) == (
        "At 1 requests a second the first token comes after 100 ms (p95 100 ms) and the others every 50.0 ms, "
        "and 0% of requests fail. No request met TTFT 0.01 s, TPOT 0.1 s."
    )
    once = told_of(good)
    assert once.endswith("fail. 1.08 a second met TTFT 1 s, TPOT 0.1 s, with 5.38 tokens/s.")
    assert "; at 2 the first token comes after 100 ms" in told_of(good, good)


def test_where_most_requests_fail_the_sentence_says_why_and_no_time_is_never() -> None:
    failing = [planted(n, failure="status 429: rate limit" if n > 2 else "") for n in range(10)]
    few = [planted(n, failure="status 429: rate limit" if n > 8 else "") for n in range(10)]
    said = told_of(few, failing)
    assert "comes after 100 ms and the others every 50.0 ms, and 10% of requests fail (status 429: rate limit)" in said
    assert "; at 2 70% of requests fail (status 429: rate limit). Most requests met" in said
    assert "never" not in said


def test_which_of_several_models_is_asked_for(endpoint: Endpoint) -> None:  # noqa: F811
    with pytest.raises(BadInput, match="serves 2 models; write served_model=a or served_model=b"):
        only_model(Endpoint(url=f"{endpoint.url}/two", model=""), 5.0)
    assert only_model(endpoint, 5.0) == "planted"


def test_no_two_prompts_are_the_same() -> None:
    prompts = [str(question.prompt) for question in questions(config(), None, 1, EVERYTHING)]
    assert len(set(prompts)) == len(prompts)


def test_a_server_is_loaded_and_told_of(
    tmp_path: Path,
    endpoint: Endpoint,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("experiments.serving.WORDS", ["answer"])
    overrides = [f"endpoint={endpoint.url}", "rates=[50,100]", "requests=12", "measure.prompt=4", "price_per_hour=1"]
    assert asked(tmp_path, *overrides) == 0
    results = read(tmp_path / "run" / "results.jsonl")
    assert [row.value for row in select(results, quantity="failed")] == [0.0, 0.0]
    assert only(results, quantity="time to first token", quantile="p99", rate=100.0).number > 0
    assert "requests a second the first token comes after" in (tmp_path / "run" / "answer.txt").read_text()
    assert max(map(len, capsys.readouterr().out.replace(str(tmp_path), "").splitlines())) <= 80


def test_guidellm_sends_the_load_where_it_is_found_and_rows_name_it(
    endpoint: Endpoint,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("experiments.serving.guidellm.load", lambda *_, **__: ("0.8.1", [planted(1.0)]))
    text, tokens = [Question(prompt="answer", new_tokens=2)], [Question(prompt=[1, 2], new_tokens=2)]
    monkeypatch.setattr("experiments.serving.guidellm.program", lambda: "guidellm")
    by, answers = loaded(endpoint, text, config(), 50.0, 0)
    assert {row.conditions["load"] for row in rows(answers, config(), 50.0, by)} == {"guidellm 0.8.1"}
    assert loaded(endpoint, text, config(load="own"), 50.0, 0)[0] == "own"
    monkeypatch.setattr("experiments.serving.load", lambda *_, **__: [planted(1.0)])
    assert loaded(endpoint, tokens, config(), 50.0, 0)[0] == "own"
    monkeypatch.setattr("experiments.serving.guidellm.program", lambda: None)
    assert loaded(endpoint, text, config(), 50.0, 0)[0] == "own"


def test_a_server_that_refuses_extensions_is_asked_without(endpoint: Endpoint) -> None:  # noqa: F811
    strict = dataclasses.replace(config(), measure=MeasureConfig(prompt=1, new_tokens=3))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("experiments.serving.WORDS", ["strict"])
        assert not warmed_up(endpoint, strict, None).takes.extensions
        patched.setattr("experiments.serving.WORDS", ["answer"])
        assert warmed_up(endpoint, strict, None).takes.extensions


def test_a_server_that_takes_no_ids_is_asked_in_the_texts_of_tokens(
    tmp_path: Path,
    endpoint: Endpoint,  # noqa: F811
) -> None:
    tokenizer = Tokenizer.train_bpe(["the king went down to the sea. " * 20], 280)
    model = GPT(tiny(vocab=tokenizer.vocabulary))
    place = export(model, tmp_path / "export", tokenizer=tokenizer)
    case = Case(experiment="serving", model=model.config, export=str(place), measure=MeasureConfig(prompt=8))
    assert {len(question.prompt) for question in questions(config(), case, 1, EVERYTHING)} == {8}
    takes = warmed_up(endpoint, config(), case).takes
    assert takes == (False, True)
    for question in questions(config(), case, 1, takes):
        assert isinstance(question.prompt, str) and "\ufffd" not in question.prompt
        assert question.prompt_tokens == len(tokenizer.encode(question.prompt)) <= 8


def test_a_server_is_asked_in_text_where_guidellm_is_to_send_it(
    tmp_path: Path,
    endpoint: Endpoint,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Tokenizer.train_bpe(["the king went down to the sea. " * 20], 280)
    place = export(GPT(tiny(vocab=tokenizer.vocabulary)), tmp_path / "export", tokenizer=tokenizer)
    case = Case(experiment="serving", model=tiny(), export=str(place), measure=MeasureConfig(prompt=8))
    monkeypatch.setattr("experiments.serving.ask", lambda *_, **__: planted(0.0))  # it takes whatever it is asked
    assert warmed_up(endpoint, config(load="auto"), case).takes.ids
    assert not warmed_up(endpoint, config(load="guidellm"), case).takes.ids


def test_prompts_that_nobody_counts_are_said_to_be() -> None:
    answers = [dataclasses.replace(planted(n), prompt_tokens=0) for n in range(10)]
    found = only(rows(answers, config(), 1.0), quantity="served tokens", phase="prefill")
    assert (found.value, found.reason) == (None, "the server does not count the tokens of a prompt")


def test_failures_are_told_and_the_first_one_stops_it(
    tmp_path: Path,
    endpoint: Endpoint,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("experiments.serving.WORDS", ["refuse"])
    assert asked(tmp_path, f"endpoint={endpoint.url}", "requests=5") == 2
    assert "does not answer a first request: status 503" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "endpoint= is missing"),
        (["endpoint=localhost:8000"], "write http://HOST:PORT"),
        (["endpoint=http://127.0.0.1:9"], "does not answer"),
        (["endpoint=http://127.0.0.1:9", "rates=[0]"], "rates=0"),
        (["endpoint=http://127.0.0.1:9", "requests=1"], "requests=1"),
        (["endpoint=http://127.0.0.1:9", "timeout=nan"], "timeout"),
        (["endpoint=http://127.0.0.1:9", "load=guidelm"], "did you mean guidellm"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert asked(tmp_path, *overrides) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.jsonl").exists()
