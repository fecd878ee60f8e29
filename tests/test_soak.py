"""An hour of training, validating, saving and generating, with flat memory: `pytest -m soak -s tests/test_soak.py`.

`ISOFORWARD_SOAK_MINUTES` shortens it; the first sixth is warm-up. It runs in a process of its own.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from isoforward.app import train as training
from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.formats.export import freeze
from isoforward.serve.inference import InferenceModule, load
from isoforward.train.stopping import KeepLast
from tests.kill import tiny_run

MINUTES = float(os.environ.get("ISOFORWARD_SOAK_MINUTES", "60"))
Sample = tuple[float, int, int, int]  # seconds, resident bytes, open files, threads


def sample() -> Sample:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    files, threads = (sum(1 for _ in Path("/proc/self", name).iterdir()) for name in ("fd", "task"))
    return time.monotonic(), resident, files, threads


class Sampling(KeepLast):
    """Also serves what was saved, and what is being trained, and looks at the process."""

    samples: ClassVar[list[Sample]] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        (checkpoint,) = self.directory.glob("last-*.ckpt")
        saved = load(checkpoint)
        for model in (saved, InferenceModule(freeze(module.model), saved.tokenizer)):
            model.generate(["To be", "or"], max_new_tokens=8)
        self.samples.append(sample())


def soaked(payload: dict[str, Any]) -> list[Sample]:
    torch.set_num_threads(1)
    setattr(training, "KeepLast", Sampling)  # noqa: B010  # mypy knows no imported name of a module
    seconds = round(60 * payload["minutes"])
    limit = f"00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    config = tiny_run(Path(payload["where"]), max_steps=10**9, checkpoint_every=20, validate_every=50, max_time=limit)
    training.train(replace(config, model=replace(config.model, layers=2, width=64)))
    return Sampling.samples


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_files_and_threads_stay_flat(tmp_path: Path) -> None:
    samples = run_isolated(soaked, {"where": str(tmp_path), "minutes": MINUTES}, threads=1)
    assert not isinstance(samples, Failed), samples.reason
    warm = samples[0][0] + 10 * MINUTES
    times, resident, files, threads = zip(*(each for each in samples if each[0] >= warm), strict=True)
    slope = 60 * statistics.linear_regression(times, resident).slope
    print(f"{len(times)} samples: {slope / 2**20:+.3f} MiB a minute at {resident[-1] / 2**20:.0f} MiB, ", end="")
    print(f"{files[0]} to {files[-1]} open files, {threads[0]} to {threads[-1]} threads")
    assert slope < 2**20
    assert max(files[-10:]) <= max(files[:10])
    assert max(threads[-10:]) <= max(threads[:10])
