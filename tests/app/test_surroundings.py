"""The commands in real processes, in the surroundings that people have: variables, homes, drives, no /proc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isoforward.base.results import read
from isoforward.formats.checkpoint_file import newest_good
from tests.loaded import loaded_python

ROOT = Path(__file__).parents[2]
TINY = [
    *("model.layers=1", "model.heads=2", "model.width=16", "model.context=16", "data=synthetic", "data.length=8"),
    *("data.tokenizer=char", "trainer.max_steps=12", "trainer.validate_every=6", "trainer.validation_batches=1"),
    *("trainer.accelerator=cpu", "precision=fp32", "sample_prompt=a"),
]
FAST = [*TINY, "measure=none", "tracking=none"]


def namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def typed(
    where: Path,
    *arguments: str,
    python: str = sys.executable,
    before: str = "",
    code: int = 0,
    **environment: str | None,
) -> tuple[str, str]:
    """What the command said; `before` are shell commands of a mount namespace of its own."""
    known = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(where / "cache"), "COLUMNS": "200", **environment}
    surroundings = {**os.environ, **{name: value for name, value in known.items() if value is not None}}
    for name, value in known.items():
        if value is None:
            surroundings.pop(name, None)
    command = [python, str(ROOT / "train.py"), *arguments]
    if before:
        command = ["unshare", "-rm", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=where, env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_variables_of_another_job_make_no_other_run_of_it(tmp_path: Path) -> None:
    """Case: RANK=3 was once a process that trained and said nothing."""
    stray: dict[str, Any] = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "NODE_RANK": "1"}
    out, err = typed(tmp_path, *FAST, "run_dir=run", **stray)
    assert "RANK, LOCAL_RANK, WORLD_SIZE, NODE_RANK: not set by torchrun, so not heeded" in err
    assert "exported to run/export" in out
    torchrun: dict[str, Any] = {**stray, "TORCHELASTIC_RUN_ID": "job", "LOCAL_WORLD_SIZE": "8"}
    _, err = typed(tmp_path, *FAST, "run_dir=other", python=loaded_python(), code=2, **torchrun)
    assert "torchrun started 8 processes" in err and "trainer.devices=8" in err


@pytest.mark.parametrize(
    "home",
    [None, *(pytest.param(home, marks=pytest.mark.slow) for home in ("", "/dev/null/nobody", "/proc/nobody"))],
)
def test_no_home_is_needed_where_the_places_are_named(home: str | None, tmp_path: Path) -> None:
    named = ["data.cache_dir=kept", "run_dir=run", "tracking=auto"]
    out, _ = typed(tmp_path, *TINY, "measure=none", *named, HOME=home, XDG_CACHE_HOME=None, WANDB_MODE="offline")
    assert "exported to run/export" in out
    assert list(tmp_path.glob("run/wandb/offline-run-*"))


def test_a_cache_that_cannot_be_written_is_told_with_its_variable(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("To be, or not to be. " * 99)
    text = ["data=text", "data.path=book.txt", "run_dir=run"]
    _, err = typed(tmp_path, *FAST, *text, python=loaded_python(), code=5, XDG_CACHE_HOME="/dev/null/nobody")
    assert "data.cache_dir= or set XDG_CACHE_HOME" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["hardware=nonsense", "trainer.max_time=soon", "trainer.max_time=0s", "compile=true"])
def test_what_cannot_be_had_is_refused_before_work_starts(key: str, tmp_path: Path) -> None:
    _, err = typed(
        tmp_path,
        *TINY,
        "tracking=none",
        key,
        "run_dir=run",
        python=sys.executable if key == "compile=true" else loaded_python(),  # torch reads CXX as it loads
        code=2,
        CXX="/none",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "i"),
    )
    assert key.partition("=")[0] in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not namespaces(), reason="mounts of one's own are not allowed here")
@pytest.mark.parametrize(
    "before",
    ["mount -t tmpfs none /proc", "mount -t proc none /proc && mount -o remount,ro /proc"],
    ids=["no", "read-only"],
)
def test_training_goes_through_without_a_proc_that_can_be_written(before: str, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "sh", "-c", before], capture_output=True).returncode:
        pytest.skip("/proc cannot be mounted here")
    out, _ = typed(tmp_path, *TINY, "measure=none", "run_dir=run", before=before, WANDB_MODE="offline")
    assert "exported to run/export" in out
    assert newest_good(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="mounts of one's own are not allowed here")
def test_measuring_without_proc_says_why_there_is_no_memory(tmp_path: Path) -> None:
    measure = ["measure.repeats=5", "measure.warmup=1", "measure.prompt=2", "measure.new_tokens=2", "measure.context=8"]
    out, _ = typed(tmp_path, *TINY, *measure, "tracking=none", "run_dir=run", before="mount -t tmpfs none /proc")
    assert "report" in out
    rows = [row for row in read(tmp_path / "run" / "results.jsonl").rows if row.quantity == "memory"]
    assert {row.provenance for row in rows} == {"unavailable"} and len(rows) >= 2
    assert all("/proc/self/status cannot be read here" in str(row.reason) for row in rows)


def test_a_drive_without_locks_and_links_holds_a_run(tmp_path: Path) -> None:
    """flock and symlink as FUSE and cloud drives answer them, in every process of the run."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n"
        "def unsupported(*_, **__):\n    raise OSError(errno.EOPNOTSUPP, 'Operation not supported')\n"
        "fcntl.flock = os.symlink = os.link = unsupported\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    out, _ = typed(tmp_path, *FAST, PYTHONPATH=path)
    assert "latest was not made (Operation not supported): name the run, checkpoint=runs/" in out
    (run,) = (tmp_path / "runs").glob("*_train")
    assert (run / ".done").exists() and json.loads((run / "export" / "manifest.json").read_text())
