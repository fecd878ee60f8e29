"""What does an optimizer hold, what does its update cost, and what loss does that buy per second and per FLOP?

    python experiments/optimizers.py
    python experiments/optimizers.py steps=500 seeds=[1,2,3]

State is read from the optimizer after a step. Updates are timed at several batch sizes, because their cost does not
grow with the batch. Each optimizer then trains the same model on the same characters, at the learning rate of its own
file in conf/optim.

:chapter: Training
:unread: measure.context measure.energy measure.new_tokens measure.prompt
"""

import dataclasses
import sys
from collections.abc import Iterator

from isoforward.app.command_line import option, run
from isoforward.app.question import asking, at_most, case_of
from isoforward.base import units
from isoforward.base.checks import at_least
from isoforward.base.config import DataConfig, ExperimentConfig, TrainConfig, TrainerConfig
from isoforward.base.results import Results, Row, only, select
from isoforward.data.corpus import prepare
from isoforward.measure.case import Case
from isoforward.measure.flops import count_training
from isoforward.measure.learning_curves import MARKS, Point, flops_curve, learning_curve, loss_rows
from isoforward.measure.passes import call_apart
from isoforward.measure.variants import bench, state_row

NAMES = ("sgd", "adam", "adamw", "muon")
BATCHES = (1, 4, 16)  # of data.length tokens each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizers(ExperimentConfig):
    steps: int = 120  # of each training
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, MARKS)


def learn(cases: list[Case], steps: int, seeds: list[int]) -> list[Row]:
    """State and curves, whose times are of whole trainings."""
    rows = [state_row(case) for case in cases]
    corpus = prepare(DataConfig(tokenizer="char", length=cases[0].length))
    curves: dict[str, list[list[Point]]] = {case.optim.name: [] for case in cases}
    for seed in seeds:
        for case in cases:
            config = TrainConfig(
                model=case.model,
                data=DataConfig(tokenizer="char", length=case.length, batch=case.batch),
                optim=case.optim,
                trainer=TrainerConfig(max_steps=steps),
            )
            found = learning_curve(config, corpus, seed=seed, length=case.length, marks=MARKS)
            curves[case.optim.name].append(found)
    for case in cases:
        rows += curve_rows(case, curves[case.optim.name])
    return rows


def curve_rows(case: Case, runs: list[list[Point]]) -> Iterator[Row]:
    """Against seconds, and against the FLOPs of forward, backward and update."""
    flops = sum(count_training(case.model, batch=case.batch, length=case.length, optim=case.optim).values())
    yield from loss_rows(case, runs, optimizer=case.optim.name, lr=case.optim.lr)
    yield from flops_curve(case, runs, flops, optimizer=case.optim.name)


def answer(results: Results) -> str:
    told = []
    for name in NAMES:
        state = only(results, quantity="state", optimizer=name).number
        updates, wholes = (
            select(results, quantity="time", phase=phase, optimizer=name) for phase in ("optimizer", "step")
        )
        shares = [update.number / whole.number for update, whole in zip(updates, wholes, strict=True)]
        last = select(results, quantity="loss", optimizer=name)[-1]
        told.append(
            f"{name} holds {units.size(state)}, takes {shares[0]:.0%} of a step of {updates[0].conditions['tokens']} "
            f"tokens and {shares[-1]:.0%} of one of {updates[-1].conditions['tokens']}, and is at {last.number:.3f} "
            f"nats after {units.seconds(last.setting('training_time_s'))}"
        )
    return f"{'; '.join(told)}."


def main(config: Optimizers) -> None:
    vocab = prepare(DataConfig(tokenizer="char", length=config.data.length)).tokenizer.vocabulary
    case = case_of(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=vocab)), "optimizers")
    cases = [dataclasses.replace(case, optim=option("optim", name), labels={"optimizer": name}) for name in NAMES]
    sized = [dataclasses.replace(each, batch=batch) for each in cases for batch in BATCHES]
    with asking(config, answer) as run:
        run.say(f"measuring optimizers{at_most(config.measure)}, and then training with each")
        run.measure(sized[0], bench, sized)
        run.add(call_apart(learn, cases, config.steps, config.seeds, threads=case.threads, what="training"))


if __name__ == "__main__":
    sys.exit(run(main, Optimizers))
