"""How much memory does recomputing activations save, and how much longer does the backward take for it?

    python experiments/checkpointing.py
    python experiments/checkpointing.py model=gpt2 data.batch=2 data.length=512

:chapter: Training
:unread: measure.context measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys

from isoforward.app.command_line import run
from isoforward.app.question import ask_variants, case_of
from isoforward.base.config import ExperimentConfig
from isoforward.base.results import Results, Row, only

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
    ask_variants(config, cases, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
