"""Against a small server that answers, dawdles, breaks off or refuses, as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import mean
from typing import Any

import pytest

from isoforward.base.errors import BadInput
from isoforward.measure.load import Endpoint, Question, arrivals, ask, load, models

TOKENS = 5


class Handler(BaseHTTPRequestHandler):
    """What it does is the first word of the prompt."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":  # as llama.cpp's Python server
            self.send_error(404)
            return
        planted: dict[str, tuple[int, bytes]] = {
            "locked": (401, b'{"error": {"message": "Missing bearer"}}'),
            "elsewhere": (404, b'{"detail": "Not Found"}'),
            "page": (200, b"<html>hello</html>"),
            "none": (200, b'{"data": []}'),
            "two": (200, b'{"data": [{"id": "a"}, {"id": "b"}]}'),
        }
        self.answer(*planted.get(self.path.split("/")[1], (200, b'{"data": [{"id": "planted"}]}')))

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(asked["prompt"], list):  # as llama.cpp's Python server
            self.send_error(500)
            return
        behaviour = asked["prompt"].split()[0]
        self.close_connection = True
        if behaviour == "refuse" or (behaviour == "strict" and "ignore_eos" in asked):
            self.send_error(503 if behaviour == "refuse" else 422)
            return
        if behaviour == "explain":
            self.answer(500, b'{"error": {"message": "CUDA out of\\nmemory"}}')
            return
        if behaviour == "drop":
            return
        if behaviour == "hang":
            time.sleep(1.0)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if behaviour == "drip":  # a byte at a time and never a line
            for _ in range(50):
                self.send(b"x")
                time.sleep(0.02)
            return
        if behaviour == "error":
            self.send(b'data: {"error": {"message": "out of memory"}}\n\n')
            return
        if behaviour == "garble":
            self.send(b"data: {not json\n\n")
            return
        for n in range(0 if behaviour == "empty" else asked["max_tokens"]):
            if behaviour in ("break", "cut") and n == 2:
                if behaviour == "cut":
                    self.send(b"data: [DONE]\n\n")
                return
            last = n == asked["max_tokens"] - 1
            event = {"choices": [{"text": " a", "finish_reason": "length" if last else None}]}
            self.send(b"data: " + json.dumps(event).encode() + b"\n\n")
        usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": asked["max_tokens"]}}
        if behaviour == "uncounted":
            usage = {"choices": []}
        self.send(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")

    def send(self, content: bytes) -> None:
        try:
            self.wfile.write(content)
            self.wfile.flush()
        except OSError:
            pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Endpoint(url=f"http://127.0.0.1:{server.server_address[1]}", model="planted")
    server.shutdown()
    server.server_close()


def answered(endpoint: Endpoint, behaviour: str, timeout_s: float = 5.0) -> Any:
    question = Question(prompt=f"{behaviour} please", new_tokens=TOKENS)
    return ask(endpoint, question, began=time.perf_counter(), due_s=0.0, timeout_s=timeout_s)


def test_an_answer_has_the_time_of_each_token_and_the_servers_counts(endpoint: Endpoint) -> None:
    found = answered(endpoint, "answer")
    assert found.failure == ""
    assert (found.prompt_tokens, found.new_tokens, len(found.token_s)) == (7, TOKENS, TOKENS)
    assert list(found.token_s) == sorted(found.token_s)
    assert found.whole_s >= found.ttft_s > 0
    assert sum(found.itl_s) == pytest.approx(found.tpot_s * (TOKENS - 1))


def test_where_the_server_does_not_count_our_count_is_taken(endpoint: Endpoint) -> None:
    question = Question(prompt="uncounted", new_tokens=TOKENS, prompt_tokens=3)
    found = ask(endpoint, question, began=time.perf_counter(), due_s=0.0, timeout_s=5.0)
    assert (found.prompt_tokens, found.new_tokens) == (3, TOKENS)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("refuse", "status 503: Service Unavailable"),
        ("explain", "status 500: CUDA out of memory"),
        ("garble", "the stream is no JSON: '{not json'"),
        ("drop", "connection lost"),
        ("error", "an error in the stream: out of memory"),
        ("empty", "an answer without a token"),
        ("break", "the stream ended before the answer"),
        ("cut", "the stream ended before the answer"),
        ("hang", "not done within 0.3 s"),
        ("drip", "not done within 0.3 s"),
    ],
)
def test_what_is_no_answer_is_a_failure_and_bounded(endpoint: Endpoint, behaviour: str, said: str) -> None:
    found = answered(endpoint, behaviour, timeout_s=0.3 if "0.3" in said else 5.0)
    assert said in found.failure


def test_nobody_there_is_a_failure_of_the_request_and_a_refusal_before_the_load() -> None:
    nowhere = Endpoint(url="http://127.0.0.1:9", model="m")
    assert "connection lost" in answered(nowhere, "answer").failure
    with pytest.raises(BadInput, match="does not answer"):
        models(nowhere, timeout_s=1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BadInput, match="write http://HOST:PORT"):
        Endpoint(url=url, model="m")


def test_the_path_may_end_in_v1_or_have_more_before_it() -> None:
    for end in ("", "/", "/v1", "/v1/"):
        assert Endpoint(url=f"http://host:1{end}", model="m").path("models") == "/v1/models"
    assert Endpoint(url="http://host/engine/", model="m").path("models") == "/engine/v1/models"


def test_the_server_names_its_models(endpoint: Endpoint) -> None:
    assert models(endpoint, timeout_s=5) == ["planted"]


@pytest.mark.parametrize(
    ("below", "said"),
    [
        ("locked", "answers /locked/v1/models with status 401: Missing bearer"),
        ("elsewhere", "with status 404: Not Found; write served_model=NAME"),
        ("page", "is no server of OpenAI's kind: /page/v1/models gives '<html>hello</html>'"),
        ("none", "names no model under /none/v1/models; write served_model=NAME"),
    ],
)
def test_a_server_that_names_no_model_is_refused_in_its_own_words(endpoint: Endpoint, below: str, said: str) -> None:
    with pytest.raises(BadInput) as refusal:
        models(Endpoint(url=f"{endpoint.url}/{below}", model=""), timeout_s=5)
    assert str(refusal.value).startswith(f"endpoint={endpoint.url}/{below} ")
    assert said in str(refusal.value)


def test_arrivals_are_poisson() -> None:
    moments = arrivals(4.0, 20_000, seed=3)
    gaps = [later - one for one, later in zip([0.0, *moments], moments, strict=False)]
    assert mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert mean(gap**2 for gap in gaps) == pytest.approx(2 * 0.25**2, rel=0.05)  # exponential
    assert arrivals(4.0, 5, seed=3) == moments[:5]


def test_a_load_answers_every_question_and_counts_failures_among_them(endpoint: Endpoint) -> None:
    behaviours = ["answer", "refuse", "break", "answer", "drop", "answer"]
    questions = [Question(prompt=behaviour, new_tokens=3) for behaviour in behaviours]
    found = load(endpoint, questions, rate=200.0, timeout_s=5, seed=0)
    assert [answer.failure == "" for answer in found] == [behaviour == "answer" for behaviour in behaviours]


def test_waiting_counts_from_when_a_request_was_due(endpoint: Endpoint) -> None:
    question = Question(prompt="answer", new_tokens=2)
    late = ask(endpoint, question, began=time.perf_counter() - 1.0, due_s=0.0, timeout_s=5)
    assert late.ttft_s >= 1.0
