"""A server of OpenAI's completions, as vLLM and others answer, and everything that one can do wrong."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.serve import endpoint
from isoforward.serve.endpoint import Endpoint, root_of

TOKENIZER = Tokenizer.from_characters(["the king\n"])
KING = TOKENIZER.encode("king")
LOGPROBS = [-0.5, -1.5, -2.5, -0.25]


def answered(**more: Any) -> dict[str, Any]:
    """As vLLM 0.32 answers."""
    logprobs = {"tokens": list("king"), "token_logprobs": LOGPROBS, "text_offset": [0, 1, 2, 3], "top_logprobs": None}
    choice = {"index": 0, "text": "king", "logprobs": logprobs, "finish_reason": "length", "token_ids": KING}
    return {"object": "text_completion", "choices": [{**choice, **more}], "usage": {"prompt_tokens": 3}}


class Server:
    """On loopback: `says` is its answer to completions, a status with a body, or None to hang up."""

    def __init__(self) -> None:
        self.says: tuple[int, bytes] | None = (200, json.dumps(answered()).encode())
        self.refuses_ids: int | None = None  # with this status
        self.knows: set[str] | None = None  # keys; it refuses others
        self.goes_on = threading.Event()  # set: it answers at once
        self.goes_on.set()
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.paths.append(self.path)
                self.reply(200, json.dumps({"data": [{"id": "king"}]}).encode())

            def do_POST(self) -> None:
                server.paths.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                server.goes_on.wait(5)
                if server.refuses_ids and isinstance(body["prompt"], list):
                    self.reply(server.refuses_ids, b'{"detail": "prompt: Input should be a valid string"}')
                elif server.knows is not None and body.keys() - server.knows:
                    self.reply(400, b'{"error": "unrecognized arguments"}')
                elif server.says is not None:
                    self.reply(*server.says)

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that waited no longer
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def complete(server: Server) -> endpoint.Answer:
    prompt = TOKENIZER.encode("the")
    return Endpoint(server.url, TOKENIZER).complete(prompt, new_tokens=4, temperature=1.0, seed=7)


def test_prompts_go_as_ids_and_tokens_come_with_their_logprobs(server: Server) -> None:
    answer = complete(server)
    assert (answer.tokens, answer.logprobs) == (KING, LOGPROBS)
    asked = server.asked[-1]
    assert asked["prompt"] == TOKENIZER.encode("the")
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["seed"]) == ("king", 4, 1.0, 7)


@pytest.mark.parametrize("status", [422, 500])  # llama.cpp's Python server falls over ids with a 500
def test_a_server_that_takes_text_alone_and_gives_texts_is_understood(server: Server, status: int) -> None:
    server.refuses_ids = status
    server.says = (200, json.dumps(answered(token_ids=None)).encode())
    assert complete(server).tokens == KING
    assert server.asked[-1]["prompt"] == "the"


def test_what_a_server_takes_is_found_out_once(server: Server) -> None:
    server.refuses_ids = 422
    engine = Endpoint(server.url, TOKENIZER)
    assert engine.takes == (False, True)
    tries = len(server.asked)
    server.says = (500, b"out of memory")
    with pytest.raises(BadInput, match=r"with 500: .*out of memory"):
        engine.complete(KING, new_tokens=4, temperature=1.0, seed=7)
    assert len(server.asked) == tries + 1


def test_keys_of_other_engines_are_left_out_where_they_are_refused(server: Server) -> None:
    assert {"return_token_ids", "top_k", "min_p", "repeat_penalty"} < set(complete_asks(server))
    server.knows = {"model", "prompt", "max_tokens", "temperature", "seed", "logprobs", "top_p"}
    assert set(complete_asks(server)) == server.knows


def complete_asks(server: Server) -> dict[str, Any]:
    complete(server)
    return server.asked[-1]


BYTES = Tokenizer.train_bpe(["the king " * 20], 300)


def test_an_answer_ends_before_a_token_whose_text_is_not_its_own(server: Server) -> None:
    """llama.cpp gives a part of a character as an empty text."""
    (space,) = BYTES.encode(" ")
    for unknown in ("", "\ufffd"):
        logprobs = {"tokens": ["the", " ", unknown, "the"], "token_logprobs": LOGPROBS}
        said = answered(token_ids=None, logprobs=logprobs)
        server.says = (200, json.dumps(said | {"usage": {}}).encode())
        found = Endpoint(server.url, BYTES).complete(BYTES.encode("the"), new_tokens=4, temperature=1.0, seed=7)
        assert (found.tokens, found.logprobs) == ([*BYTES.encode("the"), space], LOGPROBS[:2])


def test_a_text_is_answered_with_the_ids_that_it_was_read_as(server: Server) -> None:
    server.refuses_ids = 422
    apart = [id for letter in "the" for id in BYTES.encode(letter)]
    server.says = (200, json.dumps(answered(token_ids=None) | {"usage": {"prompt_tokens": 1}}).encode())
    found = Endpoint(server.url, BYTES).complete(apart, new_tokens=4, temperature=1.0, seed=7)
    assert found.prompt == BYTES.encode("the") != apart


def test_an_answer_may_end_at_once(server: Server) -> None:
    server.says = (200, broken(token_ids=[], logprobs={"tokens": [], "token_logprobs": []}))
    assert complete(server).tokens == []


def broken(**more: Any) -> bytes:
    return json.dumps(answered(**more)).encode()


LOGPROBS_OF = answered()["choices"][0]["logprobs"]


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ((200, broken(logprobs=None)), "gives no log-probabilities"),
        ((200, broken(logprobs={**LOGPROBS_OF, "token_logprobs": [None] * 4})), "gives None where a log-probability"),
        ((200, broken(token_ids=4)), "no token_ids"),
        ((200, broken(token_ids=["k", "i", "n", "g"])), "for token ids"),
        ((200, broken(token_ids=KING[:2])), "4 log-probabilities for 2 tokens"),
        ((200, broken(token_ids=[1, 2, 3, 99])), "another tokenizer than the checkpoint's: it gives token 99"),
        ((200, broken(token_ids=None, logprobs={**LOGPROBS_OF, "tokens": ["ki", "n", "g", "!"]})), "another tokenizer"),
        ((200, json.dumps({**answered(), "usage": {"prompt_tokens": 4}}).encode()), "reads 4 tokens in a prompt of 3"),
        ((200, b"<html>hello</html>"), "gives no answer"),
        ((200, b'{"choices": []}'), "gives no log-probabilities"),
        ((200, b"[]"), "no choices: it does not speak OpenAI's completions"),
        ((500, b'{"error": "out of memory"}'), "refuses /completions with 500: .*out of memory"),
        (None, "gives no answer"),
    ],
)
def test_what_a_server_does_wrong_is_told_in_one_line(
    server: Server, says: tuple[int, bytes] | None, told: str
) -> None:
    server.says = says
    with pytest.raises(BadInput, match=told) as refusal:
        complete(server)
    assert "\n" not in str(refusal.value)


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(BadInput, match=r"gives no answer .*refused.*start the server"):
        Endpoint("http://127.0.0.1:9/v1", TOKENIZER)
    with pytest.raises(BadInput, match=r"endpoint=127\.0\.0\.1:8000/v1 is no address .*write http://HOST:PORT"):
        Endpoint("127.0.0.1:8000/v1", TOKENIZER)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_of_a_server_is_taken_with_and_without_v1(server: Server, end: str) -> None:
    server.url = server.url.removesuffix("/v1") + end
    assert complete(server).tokens == KING
    assert server.paths == ["/v1/models", "/v1/completions", "/v1/completions"]


@pytest.mark.parametrize("url", ["http://", "ftp://h", "http://h:port/v1", "http://h:0", "h:8000"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BadInput, match=f"endpoint={url} is no address"):
        root_of(url)


def test_a_server_that_does_not_answer_in_time_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ANSWER_S", 0.05)
    server.goes_on.clear()
    with pytest.raises(BadInput, match=r"gives no answer .*timed out"):
        complete(server)
    server.goes_on.set()
