"""Requests to a server of OpenAI's kind, at Poisson arrivals, and what each got: the times of its tokens, or a failure.

The load is open: a request is sent at the moment that was drawn for it, however many are still waiting, and its times
count from that moment. A client that waits for answers before it asks again would hide what a slow server does.
A request that is refused, broken off, cut short, empty or not done in time is a failure. It is never a fast answer.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict
from urllib.parse import urlsplit

from isoforward.base.errors import BadInput
from isoforward.formats.untrusted import shown
from isoforward.serve.endpoint import EVERYTHING, Takes, root_of, told_by

LONGEST_LINE = 2**20  # bytes: more without an end of line is no stream of tokens
DONE = "done"  # no more than that a stream says it ends: llama.cpp's does so too when the next request interrupts it
MOST_AT_ONCE = 1024  # requests that wait: one more is a failure of its own


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """`url` is the server's, which root_of reads."""

    url: str
    model: str
    takes: Takes = EVERYTHING

    def __post_init__(self) -> None:
        root_of(self.url)

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(str(parts.hostname), parts.port, timeout=timeout_s)

    def path(self, name: str) -> str:
        return f"{urlsplit(root_of(self.url)).path}/{name}"


@dataclass(frozen=True, kw_only=True)
class Question:
    prompt: str | list[int]  # text, or tokens
    new_tokens: int
    prompt_tokens: int = 0  # as we count, for a server that does not


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Seconds since the load began. `due_s` is when the request was to be sent."""

    due_s: float
    token_s: tuple[float, ...] = ()  # of each piece that came
    end_s: float = 0.0
    prompt_tokens: int = 0  # as the server counts, where it does
    new_tokens: int = 0
    failure: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None of an answer of one."""
        return (self.token_s[-1] - self.token_s[0]) / (self.new_tokens - 1) if self.new_tokens > 1 else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        return tuple(later - one for one, later in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def whole_s(self) -> float:
        return self.end_s - self.due_s


class Choice(TypedDict, total=False):
    text: str
    finish_reason: str | None


class Event(TypedDict, total=False):
    """Of a stream: what is read of it, as OpenAI's API has it; a server may send anything."""

    choices: list[Choice]
    usage: dict[str, int] | None


class Refused(Exception):
    """Why a request failed."""


def models(endpoint: Endpoint, *, timeout_s: float) -> list[str]:
    """That the server says it has; BadInput where it does not answer."""
    connection, path = endpoint.connect(timeout_s), endpoint.path("models")
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        content = response.read(LONGEST_LINE)
    except (OSError, http.client.HTTPException) as error:
        raise BadInput(f"endpoint={endpoint.url} does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
    itself = "write served_model=NAME for a server that does not list its models"
    if response.status != 200:
        way_out = f"; {itself}" if response.status == 404 else ""
        raise BadInput(f"endpoint={endpoint.url} answers {path} with {refusal_of(response, content)}{way_out}")
    try:
        found = [str(each["id"]) for each in json.loads(content)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        told = shown(content.decode("utf-8", "replace"))
        raise BadInput(f"endpoint={endpoint.url} is no server of OpenAI's kind: {path} gives {told}") from error
    if not found:
        raise BadInput(f"endpoint={endpoint.url} names no model under {path}; {itself}")
    return found


def refusal_of(response: http.client.HTTPResponse, content: bytes) -> str:
    """The status, and why, in the server's own words."""
    return f"status {response.status}: {told_by(content) or response.reason}"


def ask(endpoint: Endpoint, question: Question, *, began: float, due_s: float, timeout_s: float) -> Answer:
    """Streams one answer. `timeout_s` counts from when it was due, over all of it."""
    deadline = began + due_s + timeout_s
    times: list[float] = []
    usage: dict[str, int] = {}
    failure, reason, written = "", "", 0
    connection = endpoint.connect(max(0.001, deadline - time.perf_counter()))
    try:
        for event in events(connection, endpoint, question, deadline):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or []:
                if choice.get("text"):
                    times.append(time.perf_counter() - began)
                reason = reason or choice.get("finish_reason") or ""
        written = int(usage.get("completion_tokens", len(times)))
        if not times:
            failure = "an answer without a token"
        elif not reason or (reason == DONE and written < question.new_tokens):
            failure = "the stream ended before the answer"
    except Refused as refusal:
        failure = str(refusal)
    except TimeoutError:
        failure = f"not done within {timeout_s:g} s"
    except (OSError, ValueError, AttributeError, TypeError, http.client.HTTPException) as error:
        failure = f"connection lost: {type(error).__name__}"
    finally:
        connection.close()
    return Answer(
        due_s=due_s,
        token_s=tuple(times),
        end_s=time.perf_counter() - began,
        prompt_tokens=int(usage.get("prompt_tokens", question.prompt_tokens)),
        new_tokens=written,
        failure=failure,
    )


def events(
    connection: http.client.HTTPConnection, endpoint: Endpoint, question: Question, deadline: float
) -> Iterator[Event]:
    """Of a stream of server-sent events, until it says [DONE] or ends. Reads never wait beyond the deadline."""
    body = {
        "model": endpoint.model,
        "prompt": question.prompt,
        "max_tokens": question.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if endpoint.takes.extensions else {}),  # vLLM, SGLang, llama.cpp: each has its length
    }
    connection.request("POST", endpoint.path("completions"), json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise Refused(refusal_of(response, response.read(LONGEST_LINE)))
    left = b""
    while True:
        remaining = deadline - time.perf_counter()
        if remaining <= 0:
            raise TimeoutError
        if isinstance(connection.sock, socket.socket):
            connection.sock.settimeout(remaining)
        piece = response.read1(65536)
        if not piece:
            return
        *lines, left = (left + piece).split(b"\n")
        if len(left) > LONGEST_LINE:
            raise Refused("no stream of tokens")
        for line in lines:
            if line.startswith(b"data:"):
                content = line[5:].strip()
                if content == b"[DONE]":
                    yield {"choices": [{"finish_reason": DONE}]}
                    return
                try:
                    event = json.loads(content)
                except ValueError:
                    raise Refused(f"the stream is no JSON: {shown(content.decode('utf-8', 'replace'))}") from None
                if "error" in event:
                    raise Refused(f"an error in the stream: {told_by(content) or shown(event['error'])}")
                yield event


def arrivals(rate: float, requests: int, seed: int) -> list[float]:
    """Seconds: a Poisson process has exponential gaps."""
    draw = random.Random(seed)
    moments, now = [], 0.0
    for _ in range(requests):
        now += draw.expovariate(rate)
        moments.append(now)
    return moments


def load(
    endpoint: Endpoint, questions: Sequence[Question], *, rate: float, timeout_s: float, seed: int
) -> list[Answer]:
    """All of them, `rate` a second on average; ends when the last is answered, or `timeout_s` after it was due."""
    answers: list[Answer | None] = [None] * len(questions)
    threads: list[threading.Thread] = []
    began = time.perf_counter()

    def one(n: int, due_s: float) -> None:
        answers[n] = ask(endpoint, questions[n], began=began, due_s=due_s, timeout_s=timeout_s)

    for n, due_s in enumerate(arrivals(rate, len(questions), seed)):
        time.sleep(max(0.0, began + due_s - time.perf_counter()))
        if sum(thread.is_alive() for thread in threads) >= MOST_AT_ONCE:
            answers[n] = Answer(due_s=due_s, failure=f"not sent: {MOST_AT_ONCE} requests were waiting")
            continue
        threads.append(threading.Thread(target=one, args=(n, due_s), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return [answer for answer in answers if answer is not None]
