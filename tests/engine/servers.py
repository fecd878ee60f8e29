"""Engines that are started for a test, on loopback."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from isoforward.base.results import Results, read
from isoforward.data.tokenizer import Tokenizer
from isoforward.serve.decoding import Sampling
from isoforward.serve.endpoint import Endpoint
from isoforward.serve.inference import load

PROMPTS = ("ROMEO:", "First Citizen:\n", "The king")
NEW_TOKENS = 48
ROOT = Path(__file__).resolve().parents[2]
STARTS_S = 300


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], health: str, where: Path) -> Iterator[str]:
    """`command` without its host and port, run in `where`; gives the address once its path `health` answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    path = f"{Path(command[0]).parent}:{os.environ['PATH']}"
    variables = {**os.environ, **environment, "PATH": path}
    variables.pop("PYTHONPATH", None)
    log = where / "log"
    with log.open("wb") as file:
        whole = [*command, "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(whole, env=variables, cwd=where, stdout=file, stderr=file)
    try:
        wait_for(f"http://127.0.0.1:{port}{health}", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    ends = time.monotonic() + STARTS_S
    while time.monotonic() < ends:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            assert server.poll() is None, log.read_text("utf-8", "replace")[-3000:]
            time.sleep(1)
    pytest.fail(f"it did not start in {STARTS_S} s: {log.read_text('utf-8', 'replace')[-3000:]}")


def greedy_tokens(trained: Path, url: str, tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    """Theirs and ours."""
    module = load(trained, kernels="reference")
    ids = module.encode(prompt)
    theirs = Endpoint(url, tokenizer).complete(ids, new_tokens=NEW_TOKENS, temperature=0.0, seed=1)
    (ours,) = module.complete([ids], max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=0))
    return theirs.tokens, list(ours.tokens)


def mismatch_of(trained: Path, url: str, run_dir: Path) -> Results:
    """Of the question, as it is typed."""
    keys = [f"checkpoint={trained}", "precision=fp32", "sequences=8", "measure.budget=2", "tracking=none"]
    keys += [f"endpoint={url}", f"run_dir={run_dir}"]
    script = ROOT / "experiments" / "mismatch.py"
    subprocess.run([sys.executable, script, *keys], cwd=ROOT, check=True, capture_output=True)
    return read(run_dir / "results.jsonl")
