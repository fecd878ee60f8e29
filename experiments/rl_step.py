"""How much of a step of reinforcement learning is inference, and where does rollout cost as much as the update?

    python experiments/rl_step.py
    python experiments/rl_step.py new_tokens=64 group=8 epochs=2 steps=200
    python experiments/rl_step.py predicted_model=qwen3_0_6b predicted_hardware=h200

A GRPO step (Shao 2024) on our own model, whose tokens are the ten digits: each prompt is answered `group` times by the
frozen weights, a program judges the answers, and training's forward, loss, backward and optimizer learn from that.
reward=counting is the share of digits that are one more than the digit before (after 9 comes 0); reward=perfect is 1
where all of them are, and else 0. The step is timed phase by phase, beside a supervised step on the same tokens, then
with other groups, lengths of answers, prompts and epochs. Its rollout is timed once more against an exact one, which
decodes with the bits of training's forward, so that a token's importance ratio before the first update is 1. `steps` of
it are taken under each of `seeds`, to learn.

Answers end at new_tokens, and every prompt is read once for each answer: no prefix is shared. Last, what the same step
takes of a large model elsewhere is predicted, by the length of its answers; isoforward.plan.lifetime says how.

:chapter: Training against inference
:unread: measure.context measure.energy measure.new_tokens measure.prompt optim.min_lr optim.schedule
optim.warmup_steps
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from isoforward.app.command_line import option, run
from isoforward.app.question import asking, at_most, case_of
from isoforward.base import units
from isoforward.base.checks import at_least, one_of
from isoforward.base.config import ExperimentConfig, ModelConfig
from isoforward.base.datasheets import lookup
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, only, select
from isoforward.base.statistics import summarise
from isoforward.base.vocabulary import Condition
from isoforward.measure.case import Case
from isoforward.measure.learning_curves import middle
from isoforward.measure.passes import call_apart, fields
from isoforward.measure.reinforcement import EXACT, ROLLOUT, USUAL, Shape, bench, memory_rows, rewards_of
from isoforward.model.grpo import Reward
from isoforward.plan.lifetime import Assumptions, plan

DIGITS = 10
ENDS = 10  # first and last steps whose rewards are compared
MARKS = 10
FACTORS = (0.25, 4)  # of the sweeps
SWEPT = {
    "new_tokens": "tokens an answer",
    "epochs": "epochs",
    "group": "answers to a prompt",
    "batch": "answers in all",
}
ANSWERS = (16, 64, 256, 1024, 4096)  # tokens, of what is predicted
PREDICTED_BATCH, PREDICTED_PROMPT = 64, 512


def counting(prompts: Tensor, answers: Tensor) -> Tensor:
    before = torch.cat((prompts[:, -1:], answers[:, :-1]), dim=1)
    return ((before + 1) % DIGITS == answers).float().mean(1)


def perfect(prompts: Tensor, answers: Tensor) -> Tensor:
    return (counting(prompts, answers) == 1).float()


REWARDS: dict[str, Reward] = {"counting": counting, "perfect": perfect}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlStep(ExperimentConfig):
    reward: str = "counting"
    prompts: int = 8  # of one step
    group: int = 16  # answers to each of them
    prompt: int = 8  # tokens of a prompt
    new_tokens: int = 16  # tokens of an answer
    epochs: int = 1  # updates on the same answers
    sweep: bool = True  # each of these changed alone
    steps: int = 100  # of learning, under each seed; 0: none
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    predicted_model: str = "llama3_8b"
    predicted_hardware: str = "h100"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("reward", self.reward, tuple(REWARDS))
        if 0 < self.steps < 2 * ENDS:
            raise BadInput(
                f"steps={self.steps} are too few to see learning; write steps={2 * ENDS} or more, or 0 for none"
            )
        at_least("steps", self.steps, 0)
        for key, given in {"checkpoint=": self.checkpoint, "model.path=": self.model.path}.items():
            if given is not None:
                raise BadInput(f"{key} has a tokenizer of its own, and rewards here judge digits; leave it out")
        if (tokens := self.prompt + self.new_tokens) > self.model.context:
            raise BadInput(
                f"prompt + new_tokens = {tokens} is longer than model.context={self.model.context}; "
                f"write model.context={tokens}"
            )
        assert self.shape  # which checks its sizes

    @property
    def shape(self) -> Shape:
        return Shape(**{key.name: getattr(self, key.name) for key in dataclasses.fields(Shape)})


def sweep(shape: Shape, context: int) -> list[Shape]:
    """The shape itself, then each of its sizes changed alone, as far as they fit."""
    shapes = [shape]
    for key, least in (("new_tokens", 2), ("group", 2), ("prompts", 1)):
        for factor in FACTORS:
            size = max(least, int(getattr(shape, key) * factor))
            shapes.append(dataclasses.replace(shape, **{key: size}))
    shapes += [dataclasses.replace(shape, epochs=shape.epochs * factor) for factor in (2, 4)]
    return [each for each in dict.fromkeys(shapes) if each.length < context]


def learn(case: Case, shape: Shape, reward: str, steps: int, seeds: list[int]) -> list[Row]:
    found = []
    for number, seed in enumerate(seeds, 1):
        found.append(rewards_of(dataclasses.replace(case, seed=seed), shape, REWARDS[reward], steps))
        spent = units.seconds(found[-1][1][-1])
        print(f"seed {seed}, {number} of {len(seeds)}: {steps} steps in {spent}", file=sys.stderr, flush=True)
    about: RowFields = {"life": "training", "phase": "run", "quantity": "reward", "per": "sequence"}
    rows = []
    for seed, (means, spent_s) in zip(seeds, found, strict=True):
        for which, part in (("first", means[:ENDS]), ("last", means[-ENDS:])):
            told = summarise(part)
            at: dict[str, Condition] = {
                "seed": seed,
                "which": f"{which} {ENDS} steps",
                "training_time_s": round(spent_s[-1], 2),
            }
            rows.append(case.row(about, fields(told), samples=(), conditions=at))
    for step in range(0, steps, max(1, steps // MARKS)):
        now: dict[str, Condition] = {"reward": reward, "step": step + 1}
        rows.append(case.row(about, middle([means[step] for means, _ in found]), conditions=now))
    return rows


def predictions(config: RlStep) -> Iterator[Row]:
    """The share of rollout, by the length of answers."""
    hardware = lookup(config.predicted_hardware)
    model: ModelConfig = option("model", config.predicted_model)
    for new in ANSWERS:
        if PREDICTED_PROMPT + new > model.context:
            continue
        asked = Assumptions(
            model=model, prompt=PREDICTED_PROMPT, new_tokens=new, decode_batch=PREDICTED_BATCH, devices=1024
        )
        elsewhere = plan(asked, hardware)
        times = elsewhere.grpo_step_s(batch=PREDICTED_BATCH, prompt=PREDICTED_PROMPT, new=new)
        at = {"predicted": f"{config.predicted_model} on {config.predicted_hardware}", "new_tokens": new}
        at |= {"batch": PREDICTED_BATCH, "prompt": PREDICTED_PROMPT}
        about: dict[str, Any] = {"experiment": "rl_step", "life": "training", "phase": "step", "per": "step"}
        about |= {"quantity": "rollout elsewhere", "provenance": "predicted", "conditions": at}
        rollout_s, whole_s = sum(times.get(phase, 0.0) for phase in ROLLOUT), sum(times.values())
        yield Row(**about, value=rollout_s / whole_s)


# What is said


def crossing(rows: list[Row], key: str) -> str:
    """Where rollout is half of the step, between two sizes that were measured; or on which side of them it is."""
    points = sorted((row.setting(key), row.number) for row in rows)
    for (one, low), (other, high) in pairwise(points):
        if (low - 0.5) * (high - 0.5) <= 0 and low != high:
            return f"at about {units.digits(one + (0.5 - low) / (high - low) * (other - one))}"
    return f"nowhere from {points[0][0]:g} to {points[-1][0]:g}, where it is {points[0][1]:.0%} to {points[-1][1]:.0%}"


def only_differs(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    """Of `batch` the number of prompts. It stays where another key differs: a larger group is then a larger batch."""
    same = all(one[name] == other[name] for name in other if name not in (key, "batch"))
    return bool(same and (key == "batch" or one["batch"] * other["group"] == other["batch"] * one["group"]))


def exactness(results: Results) -> str:
    """How far the sampler is from training, as usual and exactly, and what the latter costs."""
    usual, exact = (select(results, quantity="importance ratio", way=way) for way in (USUAL, EXACT))
    said = f"before the first update a token's probability over its sampler's is {around_one(usual)}"
    if exact[0].value is None:
        return f"{said}; {exact[0].reason}"
    times = (only(results, quantity="time", phase="rollout", way=way) for way in (EXACT, USUAL))
    return f"{said}; with exact rollout it is {around_one(exact)}, and rollout takes {results.judge(*times).sentence()}"


def around_one(ratios: Sequence[Row]) -> str:
    furthest = max(abs(row.number - 1) for row in ratios)
    return f"1 within {furthest:.0e}" if furthest else "exactly 1"


def answer(results: Results) -> str:
    shares = select(results, quantity="rollout")
    first = shares[0]
    at = first.conditions
    whole = only(results, quantity="time", phase="step", group=at["group"])
    residual = select(results, quantity="time", phase="residual")[0]
    (supervised,) = [r for r in select(results, quantity="time", phase="step") if "group" not in r.conditions]
    told = [
        f"A step on {at['batch']} answers of {at['new_tokens']} tokens takes {units.seconds(whole.number)}, "
        f"{first.number:.0%} of it rollout; against a supervised step on the same tokens it takes "
        f"{results.judge(whole, supervised).sentence()}. Its phases leave {residual.number / whole.number:.2%} of it "
        f"unexplained. Answers of a step before would let rollout and update run side by side, in "
        f"{max(first.number, 1 - first.number):.0%} of the time at best"
    ]
    for key, name in SWEPT.items():
        alike = [row for row in shares if only_differs(row.conditions, at, key)]
        if len(alike) > 2:
            told.append(f"rollout equals the rest {crossing(alike, key)} ({name})")
    told.append(exactness(results))
    learnt = [row for row in select(results, quantity="reward") if "which" in row.conditions]
    if learnt:
        risen = [(last.low or 0) > (first.high or 0) for first, last in zip(learnt[::2], learnt[1::2], strict=True)]
        firsts, lasts = [row.number for row in learnt[::2]], [row.number for row in learnt[1::2]]
        longest = max(row.setting("training_time_s") for row in learnt)
        told.append(
            f"the reward goes from {min(firsts):.2f} to {max(lasts):.2f} in {units.seconds(longest)}, up significantly "
            f"under {sum(risen)} of {len(risen)} seeds"
        )
    if predicted := select(results, quantity="rollout elsewhere"):
        by_length = ", ".join(f"{row.number:.0%} at {row.conditions['new_tokens']}" for row in predicted)
        where = predicted[0].conditions["predicted"]
        told.append(f"predicted for {where}, by tokens an answer: {by_length}")
    return f"{'; '.join(told)}."


def main(config: RlStep) -> None:
    predicted = list(predictions(config))
    sized = dataclasses.replace(config.model, vocab=DIGITS)
    case = case_of(dataclasses.replace(config, model=sized), "rl_step", rows=(config.shape.batch,))
    reward = REWARDS[config.reward]
    with asking(config, answer) as run:
        learned: list[Row] = []
        if config.steps:
            run.say(f"learning for {config.steps} steps under each of {len(config.seeds)} seeds, beside measure.budget")
            asked = (config.shape, config.reward, config.steps, config.seeds)
            learned = call_apart(learn, case, *asked, threads=case.threads, what="learning")
        run.say(f"measuring rl_step{at_most(config.measure)}")
        run.measure(case, bench, sweep(config.shape, case.model.context) if config.sweep else [config.shape], reward)
        run.add([*memory_rows(case, config.shape, reward), *learned, *predicted])


if __name__ == "__main__":
    sys.exit(run(main, RlStep))
