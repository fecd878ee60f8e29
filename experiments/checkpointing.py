"""How much memory does recomputing activations save, and how much longer does the backward take for it?

    python experiments/checkpointing.py
    python experiments/checkpointing.py model=gpt2 data.batch=2 data.length=512

:chapter: Training
:unread: measure.context measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys
from pathlib import Path

from rich.console import Console

from isoforward.app.command_line import run
from isoforward.app.question import case_of, command_line, tell
from isoforward.app.run_directory import claim
from isoforward.base.config import ExperimentConfig
from isoforward.base.results import Results, Row, only
from isoforward.measure.variants import time_variants, weigh_variants

SETTINGS = ("none", "selective", "full")


def answer(results: Results) -> str:
    def row(setting: str, **wanted: str) -> Row:
        return only(results, checkpointing=setting, **wanted)

    told = []
    for setting in SETTINGS[1:]:
        memory = [row(each, category="measured peak").number for each in (setting, "none")]
        saved = f"{setting} recomputation takes {memory[0] / memory[1]:.0%} of the memory"
        for phase in ("backward", "step"):
            found = results.judge(*(row(each, quantity="time", phase=phase) for each in (setting, "none")))
            saved += f", {phase} time {found.sentence()}"
        told.append(saved)
    flops = [row(each, quantity="flops", phase="backward").number for each in ("full", "none")]
    return f"Against keeping everything, {'; '.join(told)}. In FLOPs a full backward is {flops[0] / flops[1]:.2f}x."


def main(config: ExperimentConfig) -> None:
    case = case_of(config, "checkpointing")
    cases = [dataclasses.replace(case, checkpointing=each, labels={"checkpointing": each}) for each in SETTINGS]
    console = Console()
    with claim(config) as run_dir:
        results = Path(run_dir) / "results.jsonl"
        with console.status("measuring checkpointing"):
            weigh_variants(cases, results, time_variants(cases, results, command_line()))
        tell(config, run_dir, console, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
