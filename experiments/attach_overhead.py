"""What does watching a training cost: steps of a loop with its hooks and steps without, one after the other?

    python experiments/attach_overhead.py
    python experiments/attach_overhead.py model=gpt2

A loop of plain PyTorch: a loader's batch, forward, loss, backward, clipping, optimizer. As many steps as `phase_costs`
times one of here, once it has timed enough for a first look, are one sample, so that it holds one step that is timed by
phase; how many they are is found out first. Hooks are set and undone between the samples, not in their time.

:chapter: Trust
:unread: measure.context measure.energy measure.new_tokens measure.prompt optim.clip optim.min_lr optim.schedule
optim.warmup_steps
"""

import sys
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import RARER, Sampling
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.results import Results, only
from isoforward.measure.benchmark import timed
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.passes import Bench
from isoforward.model.optim import build

WAYS = ("alone", "watched")
LEARNED = 64  # steps from which it is known what timing one by phase takes
ENDLESS = 10**9


def bench(case: Case) -> Bench:
    model = master_of(case)
    optimizer = build(model, case.optim)
    data = TensorDataset(*batch_of(case))
    batches = iter(DataLoader(data, case.batch, sampler=RandomSampler(data, replacement=True, num_samples=ENDLESS)))

    def steps(count: int) -> None:
        for _ in range(count):
            inputs, wanted = next(batches)
            loss = cross_entropy(model(inputs).flatten(0, 1), wanted.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def watching(every: int) -> Measurement:
        """Without a count of FLOPs: what the first steps take is no cost of each step."""
        measurement = Measurement(Sampling(every=every, warmup=1, count_flops=False), validation_by_mode=True)
        measurement.start([model], optimizer)
        return measurement

    learning = watching(2)
    steps(LEARNED)
    learning.stop()
    every = max(RARER * Sampling().every, learning.account.draws.interval())
    attached: list[Measurement] = []

    def prepare(how: str, count: int) -> None:
        while attached:
            attached.pop().stop()
        if how == "watched":
            attached.append(watching(every))
        steps(1)

    alone, watched = (
        timed(case.clock, case.step("step", how=how), partial(steps, every), count=every, prepare=partial(prepare, how))
        for how in WAYS
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
