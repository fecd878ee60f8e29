"""How much better is the best recipe for two cores than the usual one: sooner at a loss, or lower in bits a byte?

    python experiments/speedrun.py                          characters: 0.3 of the steps of both recipes, some minutes
    python experiments/speedrun.py scale=1                  the whole of both
    python experiments/speedrun.py track=bits               bits a byte of `python train.py` within 100 seconds
    python experiments/speedrun.py recipes=[baby,mine]      conf/recipe/mine.yaml against the usual one

Two tracks, and in each the usual recipe against another. `loss`: who is sooner at the loss that `baby` ends at, on
characters? `bits`: who has fewer bits a byte on the held-out plays, after at most 100 seconds of training? All train
through the Lightning module, one seed of each in turn, and are judged on the same text, which their tuning never looked
at: `fast` was tuned on the held-out plays and is judged on others that it does not train on, `verse` was tuned on those
and is judged on the held-out plays. Intervals are the range over the seeds.

:chapter: Training
:unread: measure.budget measure.context measure.energy measure.margin measure.new_tokens measure.precision
measure.processes measure.prompt measure.repeats measure.warmup optim.beta1 optim.beta2 optim.clip optim.lr
optim.min_lr optim.momentum optim.muon_lr optim.name optim.schedule optim.warmup_steps optim.weight_decay
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from statistics import median

import torch
from hydra import compose

from isoforward.app.command_line import register, run, typed
from isoforward.app.question import asking, case_of, precision_of
from isoforward.app.scripts import conf_directory, scripts
from isoforward.app.telling import command_line
from isoforward.base import units
from isoforward.base.checks import at_least, one_of
from isoforward.base.config import ExperimentConfig, TrainConfig
from isoforward.base.disturbance import between, look
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput
from isoforward.base.results import Record, Results, Row, RowFields, select, unavailable, write
from isoforward.base.vocabulary import Condition
from isoforward.data.corpus import Corpus, prepare
from isoforward.measure.case import Case
from isoforward.measure.learning_curves import Point, held_out, learning_curve, loss_rows, middle, reached_s
from isoforward.measure.passes import call_apart
from isoforward.measure.trust import alone

MARKS = 6  # validations of a run
TRACKS = {"loss": ("baby", "fast"), "bits": ("usual", "verse")}
LIMIT_S = 100.0  # of training, in the track of bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedrun(ExperimentConfig):
    track: str = "loss"
    recipes: list[str] | None = None  # the usual one and another; None: those of the track
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    scale: float | None = None  # of the steps of both recipes, whose schedules shrink with them; None: 0.3, of bits 1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("track", self.track, tuple(TRACKS))
        at_least("scale", self.scale, 0.01)
        if len(set(self.names)) != 2:
            raise BadInput(f"recipes={self.recipes} must be two that differ, such as recipes=[baby,fast]")
        for name in self.names:
            if not (path := conf_directory() / "recipe" / f"{name}.yaml").is_file():
                raise BadInput(f"recipes: {name} is not known; there is no {path}")

    @property
    def names(self) -> list[str]:
        return list(TRACKS[self.track]) if self.recipes is None else self.recipes

    @property
    def share(self) -> float:
        return {"loss": 0.3, "bits": 1.0}[self.track] if self.scale is None else self.scale


def recipe(name: str, scale: float) -> TrainConfig:
    """As `python train.py recipe=NAME` has it, with fewer steps."""
    config = typed(compose(register(scripts()["train"], TrainConfig), overrides=[f"recipe={name}"]), TrainConfig)
    steps = max(MARKS, round(config.trainer.max_steps * scale))
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=steps))


def unseen(corpus: Corpus) -> Corpus:
    """The last plays of the training text judge; what is trained on ends before them."""
    cut = len(corpus.train) - len(corpus.validation)
    return dataclasses.replace(corpus, train=corpus.train[:cut], validation=corpus.train[cut:])


def measure(case: Case, track: str, recipes: dict[str, TrainConfig], seeds: list[int], command: str) -> list[Record]:
    where = environment(command, torch.device(case.device))
    corpora = {name: prepare(config.data) for name, config in recipes.items()}
    if track == "loss":
        corpora = {name: unseen(corpus) for name, corpus in corpora.items()}
    if len({corpus.hash for corpus in corpora.values()}) > 1:
        raise BadInput("recipes: their tokens differ, so that their losses cannot be compared")
    corpus = next(iter(corpora.values()))
    length = min(config.data.length for config in recipes.values())  # of the windows that all are judged on
    curves: dict[str, list[list[Point]]] = {name: [] for name in recipes}
    before = look()
    for turn, seed in enumerate(seeds):
        for name in sorted(recipes, reverse=turn % 2 == 0):
            found = learning_curve(
                recipes[name], corpora[name], seed=seed, length=length, marks=MARKS, precision=case.precision
            )
            curves[name].append(found)
    judged = alone(case.experiment, between(before, look()), environment=where.id)
    rows = [*losses(case, recipes, curves)]
    rows += times_to_loss(case, curves) if track == "loss" else bits(case, corpus, length, curves)
    return [where, *(dataclasses.replace(each, environment=where.id) for each in rows), judged]


def losses(case: Case, recipes: dict[str, TrainConfig], curves: dict[str, list[list[Point]]]) -> Iterator[Row]:
    for name, runs in curves.items():
        data = recipes[name].data
        yield from loss_rows(case, runs, recipe=name, tokens=data.batch * data.length)


def times_to_loss(case: Case, curves: dict[str, list[list[Point]]]) -> Iterator[Row]:
    """When each is first at the loss that the first one ends at, seed by seed."""
    usual = next(iter(curves))
    goals = [points[-1].loss for points in curves[usual]]
    about: RowFields = {"life": "training", "phase": "run", "quantity": "time_to_loss", "per": "run"}
    for name, runs in curves.items():
        at: dict[str, Condition] = {
            "recipe": name,
            "goal": f"the loss that {usual} ends at",
            "goal_nats": round(median(goals), 3),
        }
        reached = [reached_s(points, goal) for points, goal in zip(runs, goals, strict=True)]
        times = [time_s for time_s in reached if time_s is not None]
        if len(times) < len(reached):
            yield case.row(about, unavailable(f"{name} did not reach it under every seed"), conditions=at)
        else:
            yield case.row(about, middle(times), conditions=at)


def bits(case: Case, corpus: Corpus, length: int, curves: dict[str, list[list[Point]]]) -> Iterator[Row]:
    """What each recipe ends at, and the time that its slowest seed took."""
    per_byte = corpus.bytes_a_token(held_out(corpus, length).judged)
    assert per_byte is not None  # there is text
    for name, runs in curves.items():
        took_s = max(points[-1].time_s for points in runs)
        found = middle([points[-1].loss / math.log(2) / per_byte for points in runs])
        at: dict[str, Condition] = {"recipe": name, "training_time_s": round(took_s, 2)}
        about: RowFields = {"life": "training", "phase": "run", "quantity": "bits_per_byte", "per": "run"}
        yield case.row(about, found, conditions=at)


def answer(results: Results) -> str:
    found = select(results, quantity="bits_per_byte")
    return sooner(*select(results, quantity="time_to_loss")) if not found else lower(*found)


def sooner(usual: Row, other: Row) -> str:
    begun = (
        f"The {usual.conditions['recipe']} recipe ends at {usual.conditions['goal_nats']} nats a character "
        f"(of plays that tuning never looked at) after {units.seconds(usual.number)} of training"
    )
    if other.value is None:
        return f"{begun}; {other.reason}."
    ratios = sorted(mine / theirs for mine, theirs in zip(other.samples, usual.samples, strict=True))
    return (
        f"{begun}; the {other.conditions['recipe']} recipe is there after {units.seconds(other.value)}, "
        f"{units.times(median(ratios))} the time ({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} seeds)."
    )


def lower(*rows: Row) -> str:
    told = []
    for row in rows:
        took_s = row.setting("training_time_s")
        over = f", over the limit of {LIMIT_S:.0f} s" if took_s > LIMIT_S else ""
        ends = f"{row.low:.3f} to {row.high:.3f} over {len(row.samples)} seeds"
        told.append(
            f"the {row.conditions['recipe']} recipe ends at {row.value:.3f} bits a byte ({ends}) after at most "
            f"{units.seconds(took_s)} of training{over}"
        )
    sentence = "; ".join(told)
    return f"{sentence[0].upper()}{sentence[1:]}."


def main(config: Speedrun) -> None:
    recipes = {name: recipe(name, config.share) for name in config.names}
    case = case_of(config, "speedrun")
    if config.track == "bits":  # in the precision that train.py takes here
        precision, _ = precision_of(config, case.model, torch.device(case.device))
        case = dataclasses.replace(case, precision=precision)
    with asking(config, answer) as run:
        run.say("training with both recipes, seed by seed")
        asked = (config.track, recipes, config.seeds, command_line())
        write(run.results, call_apart(measure, case, *asked, threads=case.threads, what="speedrun"))


if __name__ == "__main__":
    sys.exit(run(main, Speedrun))
