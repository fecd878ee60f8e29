"""The load of load.py by guidellm, a kept load generator, which runs in an environment of its own (`make load`).

It keeps first and last token of each answer, but none between them: here they are evenly spaced, so that the time
between tokens is each answer's mean. What it counts as answered is looked at again: late or cut short is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import numpy as np

from isoforward.base.errors import BadInput
from isoforward.measure.load import Answer, Endpoint, Question
from isoforward.serve.endpoint import root_of

STARTS_S = 180.0  # until its processes are up
TRIES = 3
OWN = "or write load=own"
# One process sends them all: several take their first requests at once where they start before its clock is set.
SETTINGS = {"GUIDELLM__MAX_WORKER_PROCESSES": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


class Info(TypedDict):
    status: str
    error: str | None
    timings: dict[str, float | None]


class Request(TypedDict):
    request_args: str | None  # JSON, of what was sent; of a failure it may not be there
    info: Info
    output_metrics: dict[str, int] | None
    output_tokens: int | None
    prompt_tokens: int | None


class Benchmark(TypedDict):
    scheduler_state: dict[str, float]
    requests: dict[str, list[Request] | None]


class Report(TypedDict):
    """Of guidellm 0.8: what is read of it."""

    metadata: dict[str, str]
    benchmarks: list[Benchmark]


def program() -> str | None:
    """Of `make load`, or on the path."""
    return shutil.which("guidellm", path=os.pathsep.join((".venv-load/bin", os.environ.get("PATH", ""))))


def load(
    endpoint: Endpoint, questions: Sequence[Question], *, rate: float, timeout_s: float, seed: int
) -> tuple[str, list[Answer]]:
    """Its version, and an answer for each question, whose prompt is text; BadInput where it cannot run."""
    if (found := program()) is None:
        raise BadInput(f"load=guidellm: no guidellm here; make load sets it up, {OWN}")
    for _ in range(TRIES):
        report = ran(found, endpoint, questions, rate=rate, timeout_s=timeout_s, seed=seed)
        if (answers := answers_of(report, questions, timeout_s)) is not None:
            return str(report["metadata"]["guidellm_version"]), answers
    raise BadInput(f"load=guidellm: in {TRIES} tries it sent requests before its clock was set; try again, {OWN}")


def ran(
    found: str, endpoint: Endpoint, questions: Sequence[Question], *, rate: float, timeout_s: float, seed: int
) -> Report:
    """What it writes of one load."""
    body = {"max_tokens": questions[0].new_tokens} | ({"ignore_eos": True} if endpoint.takes.extensions else {})
    backend = {
        "kind": "openai_http",
        "target": root_of(endpoint.url).removesuffix("/v1"),
        "model": endpoint.model,
        "request_format": "/v1/completions",
        "validate_backend": False,  # by /health, which not every server has: a first request was answered already
        "timeout": timeout_s,
        "extras": {"body": body},
    }
    with TemporaryDirectory() as directory:
        prompts, written = Path(directory) / "prompts.jsonl", Path(directory) / "report.json"
        prompts.write_text("".join(json.dumps({"prompt": question.prompt}) + "\n" for question in questions))
        asked = {
            "backend": backend,
            "profile": {"kind": "poisson", "rate": [rate]},
            "constraint": {"kind": "max_requests", "count": len(questions)},
            "data": {"kind": "json_file", "path": str(prompts)},
            "seed": {"kind": "static", "value": seed},
            "output": {"kind": "json", "path": str(written)},
        }
        command = [found, "run", "--disable-console"]
        for name, value in asked.items():
            command += [f"--{name}", json.dumps(value)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS
        bound_s = STARTS_S + 2 * len(questions) / rate + timeout_s
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=bound_s)
            report: Report = json.loads(written.read_bytes())
            return report
        except subprocess.TimeoutExpired:
            raise BadInput(f"load=guidellm: not done within {bound_s:.0f} s; see the server's log, {OWN}") from None
        except (OSError, ValueError) as error:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise BadInput(f"load=guidellm wrote no report: {said[0][:200]}; mend that, {OWN}") from error


def answers_of(report: Report, questions: Sequence[Question], timeout_s: float) -> list[Answer] | None:
    """In the order in which they were due; None where requests were due before the load began."""
    (benchmark,) = report["benchmarks"]
    began = float(benchmark["scheduler_state"]["start_time"])
    requests = [one for kind in ("successful", "errored", "incomplete") for one in benchmark["requests"][kind] or []]
    due = [one["info"]["timings"]["targeted_start"] for one in requests]
    if any(each is not None and each < began for each in due):
        return None
    lengths = {str(question.prompt): question.prompt_tokens for question in questions}
    answers = [answer_of(one, began, timeout_s, questions[0].new_tokens, lengths) for one in requests]
    answers.sort(key=lambda answer: answer.due_s)
    last_s = max((answer.due_s for answer in answers), default=0.0)
    return answers + [Answer(due_s=last_s, failure="not sent")] * (len(questions) - len(answers))


def answer_of(request: Request, began: float, timeout_s: float, asked: int, lengths: Mapping[str, int]) -> Answer:
    """A stream that broke off counts as completed there. Its last piece is missing, which has the server's count; of a
    server that counts nothing an answer is whole with as many pieces as were asked for, and a prompt as long as
    `lengths` say, in tokens.
    """
    info = request["info"]
    names = ("targeted_start", "first_token_iteration", "last_token_iteration", "request_end")
    due_s, first, last, end = (None if at is None else at - began for at in (info["timings"][name] for name in names))
    due_s = due_s or 0.0
    counted, pieces = (request["output_metrics"] or {}).get("text_tokens"), request["output_tokens"] or 0
    written = int(counted or (pieces if pieces >= asked else 0))
    failure = ""
    if info["status"] != "completed":
        failure = " ".join(str(info["error"] or "not done when the load ended").split())[:100]
    elif first is None or last is None or end is None:
        failure = "an answer without a token"
    elif not written:
        failure = "the stream ended before the answer"
    elif end - due_s > timeout_s:
        failure = f"not done within {timeout_s:g} s"
    if failure:
        return Answer(due_s=due_s, end_s=due_s if end is None else end, failure=failure)
    prompt = json.loads(request["request_args"] or "{}").get("body", {}).get("prompt", "")
    return Answer(
        due_s=due_s,
        token_s=tuple(np.linspace(first or 0.0, last or 0.0, written).tolist()),
        end_s=end or 0.0,
        prompt_tokens=int(request["prompt_tokens"] or lengths.get(prompt, 0)),
        new_tokens=written,
    )
