"""A server that speaks OpenAI's completions: its tokens and their log-probabilities.

Prompts go as token ids where the server takes them, so that no tokenizer stands between; else as text. Servers answer
with ids (vLLM's `return_token_ids`), or with texts that our tokenizer must know one by one. What a server takes is
found out once, by its first requests.
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.untrusted import harmless, shown

CONNECT_S = 10.0  # to the list of models
ANSWER_S = 120.0  # to one answer
PROBED = 8  # tokens, by which another tokenizer is mostly known
LONGEST = 2**24  # bytes of an answer
LONGEST_SENTENCE = 150  # characters of what a server says of a failure
PLAIN = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}  # llama.cpp's own are others: nothing is cut


class Answer(NamedTuple):
    prompt: list[int]  # as the server read it: text can have other ids than it was made of
    tokens: list[int]
    logprobs: list[float]


class Refused(BadInput):
    """The server answered, and said no."""


class Takes(NamedTuple):
    """What a server takes in a request."""

    ids: bool  # prompts of token ids, and not of text alone
    extensions: bool  # keys that OpenAI's completions do not have


WAYS = tuple(Takes(ids=ids, extensions=more) for ids in (True, False) for more in (True, False))  # the best first
EVERYTHING = WAYS[0]


def first_taken(ask: Callable[[Takes], object], *, ids: bool = True) -> Takes:
    """The first way of asking that is not refused, whatever the status: some servers fall over ids. `ids`: whether
    there are any. Raises what `ask` raises for the last where none is taken.
    """
    *others, last = (way for way in WAYS if ids or not way.ids)
    for way in others:
        try:
            ask(way)
        except Refused:
            continue
        return way
    ask(last)
    return last


def root_of(url: str) -> str:
    """What the paths of a server begin with: `url` up to /v1, which may be left out, without a slash at its end."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        known = False
    if not known:
        raise BadInput(f"endpoint={url} is no address of a server; write http://HOST:PORT")
    return f"{url.rstrip('/').removesuffix('/v1').rstrip('/')}/v1"


def told_by(content: bytes) -> str:
    """The server's own sentence in an answer that is no completion, where it has one; for one line of a message."""
    try:
        found = json.loads(content)
    except ValueError:
        return ""
    for key in ("error", "message", "detail"):  # OpenAI's, older vLLM's, FastAPI's
        found = found.get(key, found) if isinstance(found, dict) else found
    return harmless(" ".join(found.split()))[:LONGEST_SENTENCE] if isinstance(found, str) else ""


class Endpoint:
    """Every failure is a BadInput that names `url`, which root_of reads."""

    def __init__(self, url: str, tokenizer: Tokenizer) -> None:
        self.url, self.tokenizer = root_of(url), tokenizer
        models = field(self.asked("models", None, CONNECT_S), "data", list)
        if not models:
            raise BadInput(f"endpoint={url} serves no model")
        self.model = field(models[0], "id", str)
        self.some = [next(id for id in tokenizer.by_text.values() if id is not None)]
        self.takes = first_taken(lambda way: self.ask(self.some, way, max_tokens=1))

    def probe(self) -> None:
        """A short answer is asked for and read: BadInput where it is none, or of another tokenizer."""
        self.complete(self.some, new_tokens=PROBED, temperature=1.0, seed=0)

    def asked(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.loads(answer.read(LONGEST))
        except urllib.error.HTTPError as refusal:
            content = refusal.read(LONGEST)
            told = told_by(content) or shown(content.decode("utf-8", "replace"))
            raise Refused(f"endpoint={self.url} refuses /{path} with {refusal.code}: {told}") from refusal
        except (OSError, http.client.HTTPException, ValueError) as error:  # a ValueError: no JSON
            why = getattr(error, "reason", None) or error
            raise BadInput(
                f"endpoint={self.url}/{path} gives no answer ({shown(str(why))}); start the server, or see its log"
            ) from error

    def ask(self, prompt: Sequence[int], way: Takes, **how: Any) -> Any:
        body: dict[str, Any] = {"model": self.model, "logprobs": 1, "top_p": 1.0, **how}
        body["prompt"] = list(prompt) if way.ids else self.tokenizer.decode(prompt)
        if way.extensions:
            body |= {"return_token_ids": True, **PLAIN}
        return self.asked("completions", body, ANSWER_S)

    def complete(self, prompt: Sequence[int], *, new_tokens: int, temperature: float, seed: int) -> Answer:
        """Up to `new_tokens` tokens, each with its log-probability; fewer where the server ends the text, or gives a
        token as a text that is not its own alone, such as a part of a character.
        """
        if not self.takes.ids:
            prompt = self.tokenizer.encode(self.tokenizer.decode(prompt))
        answer = self.ask(prompt, self.takes, max_tokens=new_tokens, temperature=temperature, seed=seed)
        return self.read(answer, prompt)

    def read(self, answer: Any, prompt: Sequence[int]) -> Answer:
        (choice, *_) = field(answer, "choices", list) or [None]
        told = choice.get("logprobs") if isinstance(choice, dict) else None
        if not isinstance(told, dict) or told.get("token_logprobs") is None:
            raise BadInput(f"endpoint={self.url} gives no log-probabilities for /completions; start it so that it does")
        logprobs = [number(each) for each in field(told, "token_logprobs", list)]
        ids = choice.get("token_ids")
        named = field(told, "tokens", list) if ids is None else field(choice, "token_ids", list)
        if len(named) != len(logprobs):
            raise BadInput(f"endpoint={self.url} gives {len(logprobs)} log-probabilities for {len(named)} tokens")
        if ids is None:
            ids = self.ids_of(named)
        if not all(isinstance(one, int) for one in ids):
            raise BadInput(f"endpoint={self.url} gives {shown(str(ids))} for token ids")
        read = answer.get("usage", {}).get("prompt_tokens")
        if read is not None and read != len(prompt):
            raise BadInput(f"{self.another}: it reads {read} tokens in a prompt of {len(prompt)}")
        if ids and max(ids) >= self.tokenizer.vocabulary:
            raise BadInput(f"{self.another}: it gives token {max(ids)}, and here are {self.tokenizer.vocabulary}")
        return Answer(list(prompt), ids, logprobs[: len(ids)])

    @property
    def another(self) -> str:
        return f"endpoint={self.url} has another tokenizer than the checkpoint's"

    def ids_of(self, texts: Sequence[object]) -> list[int]:
        """Of tokens that the server names by their texts, up to the first whose text is not its own alone."""
        known, ids = self.tokenizer.by_text, list[int]()
        for name in map(str, texts):
            text = name.replace("\ufffd", "")
            id = known[text] if text in known else self.tokenizer.backend.token_to_id(name)
            if id is None and text not in known:
                raise BadInput(f"{self.another}: {shown(name)} is a token there, and none here")
            if id is None:
                break
            ids.append(id)
        return ids


def field(of: Any, key: str, kind: type) -> Any:
    if not isinstance(of, dict) or not isinstance(of.get(key), kind):
        raise BadInput(f"the endpoint's answer has no {key}: it does not speak OpenAI's completions")
    return of[key]


def number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"the endpoint gives {shown(value)} where a log-probability should be")
    return float(value)
