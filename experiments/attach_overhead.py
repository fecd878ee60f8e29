"""What does watching a training cost: steps of a loop with its hooks and steps without, one after the other?

    python experiments/attach_overhead.py
    python experiments/attach_overhead.py model=gpt2

A loop of plain PyTorch: a loader's batch, forward, loss, backward, clipping, optimizer. One step in four is timed by
phase, as `phase_costs` does unless told otherwise. Hooks are set and undone between the steps, not in their time.

:chapter: Trust
:unread: measure.context measure.energy measure.new_tokens measure.prompt optim.clip optim.min_lr optim.schedule
optim.warmup_steps
"""

import sys
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import Sampling
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.results import Results, only
from isoforward.measure.benchmark import timed
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.passes import Bench
from isoforward.model.optim import build

WAYS = ("alone", "watched")
STEADY = Sampling(warmup=1, count_flops=False)  # what the first step takes is no cost of each step
LEAST = 4  # steps of a sample, so that one of them is timed by phase


def bench(case: Case) -> Bench:
    model = master_of(case)
    optimizer = build(model, case.optim)
    tokens, targets = batch_of(case)
    loader = DataLoader(TensorDataset(tokens, targets), batch_size=case.batch)

    def steps(count: int = LEAST) -> None:
        for _ in range(count):
            for inputs, wanted in loader:
                loss = cross_entropy(model(inputs).flatten(0, 1), wanted.flatten())
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    attached: list[Measurement] = []

    def prepare(how: str, count: int) -> None:
        while attached:
            attached.pop().stop()
        if how == "watched":
            attached.append(Measurement(STEADY, validation_by_mode=True))
            attached[-1].start([model], optimizer)
        steps(1)

    alone, watched = (
        timed(case.clock, case.step("step", how=how), steps, count=LEAST, prepare=partial(prepare, how)) for how in WAYS
    )
    return Bench(works=[alone, watched], pairs=[(watched.parts[0], alone.parts[0])])


def answer(results: Results) -> str:
    alone, watched = (only(results, phase="step", how=how) for how in WAYS)
    judged = results.judge(watched, alone).sentence()
    return f"Steps of {units.seconds(alone.value or 0.0)}: watched against alone, {judged}."


def main(config: ExperimentConfig) -> None:
    ask(config, "attach_overhead", bench, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
