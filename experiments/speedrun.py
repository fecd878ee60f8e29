"""How much sooner does the fast recipe reach the loss that the usual small-GPT recipe ends at?

    python experiments/speedrun.py                          0.3 of the steps of both recipes, some minutes
    python experiments/speedrun.py scale=1                  the whole of both
    python experiments/speedrun.py recipes=[usual,mine]     conf/recipe/mine.yaml against the usual one

Both train through the Lightning module on the same text, one seed of each in turn, and are judged on the same windows.
These come from plays that are usually trained on and that neither recipe trains on here: the fast recipe was tuned
while looking at the validation plays. Intervals are the range over the seeds.

:chapter: Training
"""

import dataclasses
import sys
from collections.abc import Iterator
from statistics import median

import torch
from omegaconf import OmegaConf
from rich.console import Console

from isoforward.app.command_line import claim, conf_directory, run, typed, writable
from isoforward.app.question import case_of, command_line, tell
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, TrainConfig, at_least
from isoforward.base.disturbance import between, look
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
from isoforward.base.results import Record, Results, Row, select, write
from isoforward.base.terminal import say
from isoforward.data.corpus import Corpus, prepare
from isoforward.measure.case import Case
from isoforward.measure.learning_curves import Point, learning_curve, loss_rows, middle, reached_s
from isoforward.measure.passes import call_apart
from isoforward.measure.trust import alone

MARKS = 6  # validations of a run
LENGTH = 64  # of the windows that both are judged on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedrun(ExperimentConfig):
    recipes: list[str] = dataclasses.field(default_factory=lambda: ["usual", "fast"])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    scale: float = 0.3  # of the steps of both recipes; the schedules shrink with them

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("scale", self.scale, 0.01)
        if len(set(self.recipes)) != 2:
            raise BadInput(f"recipes={self.recipes} must be two that differ, such as recipes=[usual,fast]")
        for name in self.recipes:
            recipe(name, self.scale)


def recipe(name: str, scale: float) -> TrainConfig:
    path = conf_directory() / "recipe" / f"{name}.yaml"
    if not path.is_file():
        raise BadInput(f"recipes: {name} is not known; there is no {path}")
    config = typed(OmegaConf.merge(writable(TrainConfig), OmegaConf.load(path)), TrainConfig)
    steps = max(MARKS, round(config.trainer.max_steps * scale))
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=steps))


def unseen(corpus: Corpus) -> Corpus:
    """The last plays of the training text judge; what is trained on ends before them."""
    cut = len(corpus.train) - len(corpus.validation)
    return dataclasses.replace(corpus, train=corpus.train[:cut], validation=corpus.train[cut:])


def measure(case: Case, names: list[str], seeds: list[int], scale: float, command: str) -> list[Record]:
    where = environment(command, torch.device(case.device))
    recipes = {name: recipe(name, scale) for name in names}
    corpora = {name: unseen(prepare(config.data)) for name, config in recipes.items()}
    if len({corpus.hash for corpus in corpora.values()}) > 1:
        raise BadInput("recipes: their tokens differ, so that their losses cannot be compared")
    curves: dict[str, list[list[Point]]] = {name: [] for name in recipes}
    before = look()
    for turn, seed in enumerate(seeds):
        for name in sorted(recipes, reverse=turn % 2 == 0):
            found = learning_curve(recipes[name], corpora[name], seed=seed, length=LENGTH, marks=MARKS)
            curves[name].append(found)
    judged = alone(case.experiment, between(before, look()), environment=where.id)
    rows = [dataclasses.replace(each, environment=where.id) for each in told(case, recipes, curves)]
    return [where, *rows, judged]


def told(case: Case, recipes: dict[str, TrainConfig], curves: dict[str, list[list[Point]]]) -> Iterator[Row]:
    for name, runs in curves.items():
        data = recipes[name].data
        yield from loss_rows(case, runs, recipe=name, tokens=data.batch * data.length)
    usual = next(iter(recipes))
    goals = [points[-1].loss for points in curves[usual]]
    about = {"life": "training", "phase": "run", "quantity": "time_to_loss", "per": "run"}
    for name, runs in curves.items():
        at = {"recipe": name, "goal": f"the loss that {usual} ends at", "goal_nats": round(median(goals), 3)}
        times = [reached_s(points, goal) for points, goal in zip(runs, goals, strict=True)]
        if None in times:
            why = f"{name} did not reach it under every seed"
            yield case.row(**about, value=None, provenance="unavailable", reason=why, conditions=at)
        else:
            yield case.row(**about, **middle(times), conditions=at)


def answer(results: Results) -> str:
    usual, other = select(results, quantity="time_to_loss")
    begun = (
        f"The {usual.conditions['recipe']} recipe ends at {usual.conditions['goal_nats']} nats a character "
        f"(of plays that tuning never looked at) after {units.seconds(usual.value)} of training"
    )
    if other.value is None:
        return f"{begun}; {other.reason}."
    ratios = sorted(mine / theirs for mine, theirs in zip(other.samples, usual.samples, strict=True))
    return (
        f"{begun}; the {other.conditions['recipe']} recipe is there after {units.seconds(other.value)}, "
        f"{units.times(median(ratios))} the time ({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} seeds)."
    )


def main(config: Speedrun) -> None:
    case = case_of(config, "speedrun")
    console = Console()
    with claim(config) as run_dir:
        say(console, "training with both recipes, seed by seed")
        asked = (config.recipes, config.seeds, config.scale, command_line())
        records = call_apart(measure, case, *asked, threads=case.threads, what="speedrun")
        write(run_dir / "results.jsonl", records)
        tell(config, run_dir, console, answer)


if __name__ == "__main__":
    sys.exit(run(main, Speedrun))
