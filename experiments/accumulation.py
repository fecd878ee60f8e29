"""What does cutting a batch into micro-batches save in memory, and what does it cost in time?

    python experiments/accumulation.py
    python experiments/accumulation.py model=small data.batch=32 parts=[1,4,16]

Every setting takes the same optimizer step on the same batch, cut into 1, 2, 4 or 8 parts.

:chapter: Training
:unread: measure.context measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys

from isoforward.app.command_line import run
from isoforward.app.question import ask_variants, case_of
from isoforward.base import units
from isoforward.base.checks import at_least
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulation(ExperimentConfig):
    parts: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8])

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts:
            at_least("parts", part, 1)
            if self.data.batch % part:
                raise BadInput(f"parts: data.batch={self.data.batch} cannot be cut into {part} equal parts")
        if len(set(self.parts)) < 2:
            raise BadInput(f"parts={self.parts} must be at least two that differ, such as parts=[1,8]")


def answer(results: Results) -> str:
    steps = {r.conditions["micro_batches"]: r for r in results.rows if r.quantity == "time" and r.phase == "step"}
    first, *rest = steps
    whole = only(results, category="measured peak", micro_batches=first)
    told = []
    for parts in rest:
        memory = only(results, category="measured peak", micro_batches=parts).number / whole.number
        time = results.judge(steps[parts], steps[first]).sentence()
        told.append(f"{parts} parts take {memory:.0%} of the memory, and in time {time}")
    return f"Against one step of {units.size(whole.number)} in {first} part: {'; '.join(told)}."


def main(config: Accumulation) -> None:
    case = case_of(config, "accumulation")
    cases = [dataclasses.replace(case, accumulate=parts, labels={"micro_batches": parts}) for parts in config.parts]
    ask_variants(config, cases, answer)


if __name__ == "__main__":
    sys.exit(run(main, Accumulation))
