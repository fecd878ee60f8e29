"""The record of where numbers came from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import isoforward
from isoforward.base import hardware
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
from isoforward.base.results import refuse_unlike

CPU = torch.device("cpu")


def test_the_environment_says_what_must_match_and_what_may_differ() -> None:
    here = environment("python train.py", CPU)
    assert here.identity["torch"] == torch.__version__
    assert here.identity["threads"] == torch.get_num_threads()
    assert here.identity["processors"] == len(os.sched_getaffinity(0))
    assert (here.identity["device"], here.identity["gpu"], here.identity["cuda"]) == ("cpu", None, None)
    assert here.details["affinity"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert datetime.fromisoformat(here.created).utcoffset() is not None


def test_where_nothing_ran_the_machine_alone_is_told() -> None:
    here, ran = environment("python plan.py", None), environment("python train.py", CPU)
    assert here.identity.keys() == {"cpu", "processors", "python", "os"}
    assert here.identity.items() <= ran.identity.items()
    assert here.details.keys() == ran.details.keys()


def test_a_change_of_threads_makes_environments_unlike() -> None:
    before, threads = environment("a", CPU), torch.get_num_threads()
    refuse_unlike(before, environment("another command", CPU))
    torch.set_num_threads(threads + 1)
    try:
        after = environment("a", CPU)
    finally:
        torch.set_num_threads(threads)
    assert after.id != before.id
    with pytest.raises(BadInput, match=rf"differ in threads \({threads} and {threads + 1}\)"):
        refuse_unlike(before, after)


def test_nothing_of_the_user_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    here = environment("python /home/alice/work/train.py data.path=/home/alice/secret.txt", CPU)
    assert here.command == "python ~/work/train.py data.path=~/secret.txt"
    shown = json.dumps([here.command, dict(here.identity), dict(here.details)])
    assert "alice" not in shown
    assert os.uname().nodename not in [*here.identity.values(), *here.details.values()]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_our_own_checkout_and_its_changed_files_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        named = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *named, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "src"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "other").touch()
    git("init")
    git("add", "other")
    git("commit", "-m", "somebody else's")
    monkeypatch.setattr(isoforward, "__file__", str(package / "__init__.py"))
    found = environment("", CPU).details
    assert (found["commit"], found["changed"]) == (None, None)
    git("add", ".")
    git("commit", "-m", "ours")
    (package / "new.py").touch()
    found = environment("", CPU).details
    assert (found["commit"], found["changed"]) == (git("rev-parse", "HEAD"), 1)


def test_a_machine_without_proc_and_a_user_without_a_home_have_a_record_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unobtainable(*_: object) -> Any:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(hardware, "read_text", lambda path: None)
    monkeypatch.setattr(os, "getloadavg", unobtainable)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert environment("python train.py", CPU).details["load"] is None
