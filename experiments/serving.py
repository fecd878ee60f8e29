"""What does a real engine give under load: how soon, how fast, for how many, and at what price?

    python experiments/serving.py endpoint=http://127.0.0.1:8000
    python experiments/serving.py endpoint=http://127.0.0.1:8000 checkpoint=runs/latest rates=[1,2,4,8]
    python experiments/serving.py endpoint=http://HOST:8000 price_per_hour=2.5 ttft=0.5 tpot=0.05 training_hours=3

For any server of OpenAI's kind that streams completions: vLLM, SGLang, llama.cpp's, `transformers serve`. docs/serve.md
starts one on an export. Requests come as a Poisson process, at one rate after the other, whether earlier ones are
answered or not, and count from when they were due. guidellm sends them where `make load` has set it up, our own client
elsewhere and where prompts are tokens, as they are with checkpoint= unless load=guidellm, which sends text. A request
that is refused, broken off, empty or late is a failure: it stands in every percentile as one that never ended. Goodput
counts the requests that met the objective, ttft and tpot. With checkpoint=, the same weights run in our own batch loop,
and on a calibrated machine a queueing model says what an engine should take. training_hours, of one device, gives the
served tokens that cost as much as training.

:chapter: Serving
:unread: measure.context measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isoforward.app.command_line import run
from isoforward.app.question import asking, case_of
from isoforward.base import units
from isoforward.base.checks import at_least, one_of, within
from isoforward.base.config import ExperimentConfig
from isoforward.base.datasheets import calibrated_here
from isoforward.base.disturbance import between, look
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, only, row_of, select
from isoforward.formats.loading import load_tokenizer
from isoforward.measure import guidellm
from isoforward.measure.benchmark import Part, timed
from isoforward.measure.case import Case, frozen_of, master_of
from isoforward.measure.load import Answer, Endpoint, Question, ask, load, models
from isoforward.measure.memory_ledger import generate
from isoforward.measure.passes import Bench, derived_fields
from isoforward.measure.trust import alone
from isoforward.model import steps
from isoforward.plan import economics
from isoforward.plan.queueing import Expected, expected
from isoforward.serve.decoding import room_for
from isoforward.serve.endpoint import Refused, Takes, first_taken

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
MOST_CAUSES = 3  # that rows and the answer give for failures
WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "with", "be", "by", "on", "not", "he")
TIMES: dict[str, Callable[[Answer], list[float]]] = {  # by quantity: of one answer
    "time to first token": lambda one: [one.ttft_s],
    "time per output token": lambda one: [] if one.tpot_s is None else [one.tpot_s],
    "time between tokens": lambda one: list(one.itl_s),
    "time of a request": lambda one: [one.whole_s],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving(ExperimentConfig):
    endpoint: str = ""
    served_model: str | None = None  # None: the one that the server names
    rates: list[float] = dataclasses.field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])  # requests a second
    requests: int = 60  # at each rate
    load: str = "auto"  # or guidellm, or own: guidellm where it is found and prompts are text
    timeout: float = 60.0  # seconds, from when a request was due
    ttft: float = 1.0  # the objective, seconds
    tpot: float = 0.1
    batches: list[int] = dataclasses.field(default_factory=lambda: [1, 8])  # of our own loop
    price_per_hour: float | None = None
    training_hours: float | None = None  # of one such device, that training the weights took

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.endpoint:
            raise BadInput("endpoint= is missing: write endpoint=http://HOST:PORT, of a server that runs")
        one_of("load", self.load, ("auto", "guidellm", "own"))
        if not self.rates or not self.batches:
            raise BadInput("rates and batches need a number each; write rates=[1,2]")
        for rate in self.rates:
            within("rates", rate, 1e-3, 1e4)
        for batch in self.batches:
            at_least("batches", batch, 1)
        within("requests", self.requests, 5, 100_000)
        for name in ("timeout", "ttft", "tpot"):
            within(name, getattr(self, name), 1e-4, 86400)
        for name in ("price_per_hour", "training_hours"):
            if (value := getattr(self, name)) is not None:
                within(name, value, 1e-9, 1e9)


def questions(config: Serving, case: Case | None, seed: int, takes: Takes) -> list[Question]:
    """Each another prompt, so that no engine answers from the cache of one before it."""
    draw, counted = random.Random(seed), range(config.requests)
    if case is None:
        texts = [" ".join(draw.choices(WORDS, k=config.measure.prompt)) for _ in counted]
        return [Question(prompt=text, new_tokens=config.measure.new_tokens) for text in texts]
    if takes.ids:
        known = range(case.model.vocabulary)
        prompts: list[Any] = [draw.choices(known, k=case.prompt) for _ in counted]
        lengths = [case.prompt for _ in counted]
    else:
        tokenizer = load_tokenizer(Path(str(case.export)))
        plain = [text for text, id in tokenizer.by_text.items() if id is not None]
        prompts = ["".join(draw.choices(plain, k=case.prompt)) for _ in counted]
        lengths = [len(ids) for ids in tokenizer.encode_batch(prompts)]
    return [
        Question(prompt=prompt, new_tokens=case.new_tokens, prompt_tokens=length)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def told(quantity: str, value: float | None, phase: str = "run", per: str = "run", **more: Any) -> Row:
    own: Any = {key: more.pop(key) for key in RowFields.__optional_keys__ if key in more}
    about: RowFields = {"life": "inference", "phase": phase, "per": per}
    return row_of("serving", about, own, quantity=quantity, value=value, conditions=more)


def quantile(times: Sequence[float], failures: int, wanted: float) -> float:
    """Of all requests: one that failed never ended."""
    ordered = sorted(times) + [math.inf] * failures
    return ordered[math.ceil(wanted * len(ordered)) - 1] if ordered else math.inf


def loaded(
    endpoint: Endpoint, asked: Sequence[Question], config: Serving, rate: float, seed: int
) -> tuple[str, list[Answer]]:
    """By which load generator, and what it saw."""
    how: Any = {"rate": rate, "timeout_s": config.timeout, "seed": seed}
    text = all(isinstance(question.prompt, str) for question in asked)
    if config.load == "guidellm" or (config.load == "auto" and text and guidellm.program() is not None):
        version, answers = guidellm.load(endpoint, asked, **how)
        return f"guidellm {version}", answers
    return "own", load(endpoint, asked, **how)


def rows(answers: Sequence[Answer], config: Serving, rate: float, by: str = "own") -> Iterator[Row]:
    at: dict[str, Any] = {"rate": rate, "requests": len(answers), "load": by}
    good = [answer for answer in answers if not answer.failure]
    failed = len(answers) - len(good)
    causes = Counter(answer.failure for answer in answers if answer.failure).most_common(MOST_CAUSES)
    reasons = ", ".join(cause for cause, _ in causes)
    yield told("failed", failed / len(answers), **at, outcome=reasons or "every request was answered")
    for quantity, of in TIMES.items():
        times = [time_s for answer in good for time_s in of(answer)]
        for name, wanted in QUANTILES.items():
            found, more = quantile(times, failed, wanted), {**at, "quantile": name}
            if math.isinf(found):
                why = f"{failed} of {len(answers)} requests failed: {reasons}" if failed else "no answer had two"
                yield told(quantity, None, per="sequence", provenance="unavailable", reason=why, **more)
            elif name == "p50" and not failed and len(times) >= 5:
                kept: Any = {**derived_fields(times), "samples": tuple(times[: config.requests])}
                yield told(quantity, per="sequence", **kept, **more)
            else:
                yield told(quantity, found, per="sequence", **more)
    span_s = max(answer.end_s for answer in answers)
    read_s = sum(answer.prompt_tokens for answer in good) / span_s
    written_s = sum(answer.new_tokens for answer in good) / span_s
    met = [one for one in good if one.ttft_s <= config.ttft and (one.tpot_s or 0.0) <= config.tpot]
    yield told("served tokens", written_s, "decode", **at)
    if good and not read_s:
        why = "the server does not count the tokens of a prompt"
        yield told("served tokens", None, "prefill", provenance="unavailable", reason=why, **at)
    else:
        yield told("served tokens", read_s, "prefill", **at)
    yield told("goodput", len(met) / span_s, **at, goal=f"TTFT {config.ttft:g} s, TPOT {config.tpot:g} s")
    if config.price_per_hour is not None:
        a_second = economics.money(1.0, price_per_hour=config.price_per_hour)
        for phase, tokens_s in (("prefill", read_s), ("decode", written_s)):
            if tokens_s:  # all of the device's time is charged to either
                paid = {"served_tokens": 1e6, "price_per_hour": config.price_per_hour}
                yield told("money", a_second / tokens_s * 1e6, phase, **(paid | at))
    if config.training_hours is not None and len(met) >= 0.9 * len(answers):
        tokens = config.training_hours * 3600 * (read_s + written_s)
        yield told("break-even", tokens, provenance="estimated", busy=1 - idle(answers), **at)


def idle(answers: Sequence[Answer]) -> float:
    """Share of the time in which no request was there: measured, where a plan would guess."""
    spans = sorted((answer.due_s, answer.end_s) for answer in answers)
    end, gaps = 0.0, 0.0
    for due_s, end_s in spans:
        gaps += max(0.0, due_s - end)
        end = max(end, end_s)
    return gaps / end if end else 0.0


# Beside it: our own loop, and a model of a queue


def bench(case: Case, batches: Sequence[int]) -> Bench:
    """A batch of prompts is read, and all of it decoded to the end, as `generate prompts_file=` does."""
    frozen = frozen_of(case, master_of(case))
    works = []
    for batch in batches:
        tokens = torch.randint(case.model.vocabulary, (batch, case.prompt))
        cache = room_for(frozen, batch=batch, capacity=case.prompt + case.new_tokens)

        def whole(tokens: torch.Tensor = tokens, cache: Any = cache) -> None:
            cache.rewind(0)
            generate(frozen, tokens, cache, new_tokens=case.new_tokens, phase=steps.unmeasured)

        conditions = case.conditions(batch=batch, prompt=case.prompt, new_tokens=case.new_tokens)
        part = Part(life="inference", phase="run", per="run", conditions=conditions | {"through": "our own batch loop"})
        works.append(timed(case.clock, part, whole))
    return Bench(works=works)


def queue_rows(case: Case, rates: Sequence[float]) -> Iterator[Row]:
    """On a calibrated machine, what an engine that batches as requests come should take."""
    from isoforward.plan.calibrated_clock import CalibratedClock
    from isoforward.plan.forecast import Calibrated, forecaster
    from isoforward.plan.subject import Known
    from isoforward.plan.subject import Serving as Served

    here = calibrated_here()
    if here is None:
        return
    by, subject = forecaster(here), Known(case.model)
    assert isinstance(by, Calibrated)
    clock, counts = CalibratedClock(here, by), (1, 8, 32)
    one = Served(users=1, prompt=case.prompt, new_tokens=case.new_tokens, precision=case.precision)
    took = [clock.decode(subject, dataclasses.replace(one, users=n), 1).value for n in counts]
    slope = (took[-1] - took[-2]) / (counts[-1] - counts[-2])

    def decode_s(n: float) -> float:
        return float(np.interp(n, counts, took)) + slope * max(0.0, n - counts[-1])

    prefill_s = clock.prefill(subject, one, 1).value
    for rate in rates:
        found = expected(rate, prefill_s=prefill_s, decode_s=decode_s, new_tokens=case.new_tokens)
        yield from expected_rows(found, rate)


def expected_rows(found: Expected, rate: float) -> Iterator[Row]:
    at: dict[str, Any] = {"rate": rate, "how": "queueing model"}
    values = {"time to first token": found.ttft_s, "time per output token": found.tpot_s}
    for quantity, value in (values | {"time of a request": found.whole_s}).items():
        if math.isinf(value):
            why = "more requests come than can be served"
            yield told(quantity, None, per="sequence", provenance="unavailable", reason=why, **at)
        else:
            yield told(quantity, value, per="sequence", provenance="predicted", **at)


# What is said


def answer(results: Results) -> str:
    rates = list(dict.fromkeys(row.setting("rate") for row in select(results, quantity="failed")))
    good = {rate: only(results, quantity="goodput", rate=rate) for rate in rates}
    best = max(rates, key=lambda rate: good[rate].number)
    goal, rate = good[best].conditions["goal"], units.digits(good[best].number)
    tokens = only(results, quantity="served tokens", phase="decode", rate=best).number
    first, *others = dict.fromkeys((rates[0], rates[-1]))
    said = f"At {first:g} requests a second {waits(results, first)}"
    said += "".join(f"; at {other:g} {waits(results, other)}" for other in others)
    if not good[best].number:
        said += f". No request met {goal}"
    elif others:
        said += f". Most requests met {goal} at {best:g} a second: {rate} a second, {units.digits(tokens)} tokens/s"
    else:
        said += f". {rate} a second met {goal}, with {units.digits(tokens)} tokens/s"
    if own := select(results, through="our own batch loop", quantity="time"):
        most = max(own, key=lambda row: row.setting("batch") / row.number)
        own_rate = most.setting("batch") * most.setting("new_tokens") / most.number
        said += f"; our own loop gives {units.digits(own_rate)} in batches of {most.conditions['batch']}"
    if met := select(results, quantity="break-even"):
        cheapest = min(met, key=lambda row: -row.number)
        said += f"; {units.count(cheapest.number)} served tokens take as long as training did"
    return said + "."


def waits(results: Results, rate: float) -> str:
    """For a first token and those after it, as far as enough requests were answered, and why others were not."""

    def time_of(quantity: str, quantile: str) -> str | None:
        value = only(results, quantity=quantity, rate=rate, quantile=quantile).value
        return None if value is None else units.seconds(value)

    failed = only(results, quantity="failed", rate=rate)
    failing = f"{failed.number:.0%} of requests fail" + (f" ({failed.conditions['outcome']})" if failed.number else "")
    first, late = (time_of("time to first token", quantile) for quantile in ("p50", "p95"))
    if first is None:
        return failing
    said = f"the first token comes after {first}" + (f" (p95 {late})" if late else "")
    if (later := time_of("time per output token", "p50")) is not None:
        said += f" and the others every {later}"
    return f"{said}, and {failing}"


def main(config: Serving) -> None:
    endpoint = Endpoint(url=config.endpoint, model=config.served_model or "")
    if config.served_model is None:  # some servers load what they did not list
        endpoint = dataclasses.replace(endpoint, model=only_model(endpoint, min(config.timeout, 10.0)))
    untrained = dataclasses.replace(config, data=dataclasses.replace(config.data, batch=1, length=1))
    case = case_of(untrained, "serving", rows=config.batches) if config.checkpoint else None
    with asking(config, answer) as run:
        run.note()
        endpoint = warmed_up(endpoint, config, case)
        before = look()
        for n, rate in enumerate(config.rates):
            run.say(f"{config.requests} requests to {endpoint.model} at {rate:g} a second")
            asked = questions(config, case, config.seed + n, endpoint.takes)
            by, answers = loaded(endpoint, asked, config, rate, config.seed + n)
            run.add(rows(answers, config, rate, by))
        run.add((), alone("serving", between(before, look()), others_are_measured=True))
        if case is not None:
            run.say("our own batch loop, and a queueing model")
            run.add(queue_rows(case, config.rates))
            run.measure(case, bench, config.batches)


def only_model(endpoint: Endpoint, timeout_s: float) -> str:
    """BadInput where the server names several: which of them is meant nobody can know."""
    first, *others = models(endpoint, timeout_s=timeout_s)
    if others:
        named = " or ".join(f"served_model={name}" for name in (first, *others[:3]))
        raise BadInput(f"endpoint={endpoint.url} serves {1 + len(others)} models; write {named}")
    return first


def warmed_up(endpoint: Endpoint, config: Serving, case: Case | None) -> Endpoint:
    """After a first request, whose answer is not counted, asked as the server takes it; BadInput where it fails."""

    def once(takes: Takes) -> None:
        first, way = questions(config, case, config.seed - 1, takes)[0], dataclasses.replace(endpoint, takes=takes)
        found = ask(way, first, began=time.perf_counter(), due_s=0.0, timeout_s=config.timeout)
        if found.failure:
            kind = Refused if found.failure.startswith("status") else BadInput
            raise kind(f"endpoint={endpoint.url} does not answer a first request: {found.failure}")

    return dataclasses.replace(endpoint, takes=first_taken(once, ids=case is not None and config.load != "guidellm"))


if __name__ == "__main__":
    sys.exit(run(main, Serving))
