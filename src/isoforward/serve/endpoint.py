"""A server that speaks OpenAI's completions: its tokens and their log-probabilities.

Prompts go as token ids where the server takes them, so that no tokenizer stands between; else as text. Servers answer
with ids (vLLM's `return_token_ids`), or with texts that our tokenizer must know one by one.
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.untrusted import shown

CONNECT_S = 10.0  # to the list of models
ANSWER_S = 120.0  # to one answer
LONGEST = 2**24  # bytes of an answer


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


class Refused(BadInput):
    """The server answered, and said no."""


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


class Endpoint:
    """Every failure is a BadInput that names `url`, which root_of reads."""

    def __init__(self, url: str, tokenizer: Tokenizer) -> None:
        self.url, self.tokenizer = root_of(url), tokenizer
        self.as_text = False  # whether prompts must go as text
        models = field(self.asked("models", None, CONNECT_S), "data", list)
        if not models:
            raise BadInput(f"endpoint={url} serves no model")
        self.model = field(models[0], "id", str)

    def asked(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.loads(answer.read(LONGEST))
        except urllib.error.HTTPError as refusal:
            told = shown(refusal.read(300).decode("utf-8", "replace"))
            raise Refused(f"endpoint={self.url} refuses /{path} with {refusal.code}: {told}") from refusal
        except (OSError, http.client.HTTPException, ValueError) as error:  # a ValueError: no JSON
            why = getattr(error, "reason", None) or error
            raise BadInput(
                f"endpoint={self.url}/{path} gives no answer ({shown(str(why))}); start the server, or see its log"
            ) from error

    def complete(self, prompt: Sequence[int], *, new_tokens: int, temperature: float, seed: int) -> Answer:
        """Up to `new_tokens` tokens, each with its log-probability."""
        body = {
            "model": self.model,
            "max_tokens": new_tokens,
            "temperature": temperature,
            "seed": seed,
            "logprobs": 1,
            "return_token_ids": True,
        }
        if not self.as_text:
            try:
                return self.read(self.asked("completions", {**body, "prompt": list(prompt)}, ANSWER_S), prompt)
            except Refused:
                self.as_text = True
        text = self.tokenizer.decode(prompt)
        return self.read(self.asked("completions", {**body, "prompt": text}, ANSWER_S), prompt)

    def read(self, answer: Any, prompt: Sequence[int]) -> Answer:
        (choice, *_) = field(answer, "choices", list) or [None]
        told = choice.get("logprobs") if isinstance(choice, dict) else None
        if not isinstance(told, dict) or not told.get("token_logprobs"):
            raise BadInput(f"endpoint={self.url} gives no log-probabilities for /completions; start it so that it does")
        logprobs = [number(each) for each in field(told, "token_logprobs", list)]
        ids = choice.get("token_ids")
        if ids is None:
            ids = [self.id_of(text) for text in field(told, "tokens", list)]
        if not all(isinstance(one, int) for one in ids) or len(ids) != len(logprobs):
            raise BadInput(f"endpoint={self.url} gives {len(logprobs)} log-probabilities for {len(ids)} tokens")
        read = answer.get("usage", {}).get("prompt_tokens")
        if read is not None and read != len(prompt):
            raise BadInput(f"{self.another}: it reads {read} tokens in a prompt of {len(prompt)}")
        if ids and max(ids) >= self.tokenizer.vocabulary:
            raise BadInput(f"{self.another}: it gives token {max(ids)}, and here are {self.tokenizer.vocabulary}")
        return Answer(ids, logprobs)

    @property
    def another(self) -> str:
        return f"endpoint={self.url} has another tokenizer than the checkpoint's"

    def id_of(self, text: object) -> int:
        """Of a token that the server names by its text."""
        name = str(text)
        found = self.tokenizer.backend.token_to_id(name)
        if found is None:
            ids = self.tokenizer.encode(name, special=True)
            if len(ids) != 1:
                raise BadInput(f"{self.another}: {shown(name)} is a token there, and {len(ids)} here")
            (found,) = ids
        return found


def field(of: Any, key: str, kind: type) -> Any:
    if not isinstance(of, dict) or not isinstance(of.get(key), kind):
        raise BadInput(f"the endpoint's answer has no {key}: it does not speak OpenAI's completions")
    return of[key]


def number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"the endpoint gives {shown(value)} where a log-probability should be")
    return float(value)
