"""A GRPO step, measured: the time, FLOPs, bytes and memory of its phases in both lives, and the reward it leads to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from isoforward.base.checks import at_least
from isoforward.base.errors import BadInput
from isoforward.base.memory_readers import why_unreadable
from isoforward.base.results import Row, RowFields, unavailable
from isoforward.base.subprocesses import Failed
from isoforward.base.vocabulary import TRAINING, Condition
from isoforward.formats.export import freeze
from isoforward.measure.benchmark import Measured, Part, Work, phased, timed
from isoforward.measure.case import Case, counted, master_of
from isoforward.measure.flops import FlopCounter, Scope, by_phase, layers_of
from isoforward.measure.memory import Life, account_of
from isoforward.measure.memory_ledger import Ledger
from isoforward.measure.mismatch import ends_of
from isoforward.measure.passes import Bench, derived_fields
from isoforward.measure.train_and_serve import Training
from isoforward.model.gpt import GPT
from isoforward.model.grpo import Outcome, Plan, Reward, Rollout, grpo_step
from isoforward.model.grpo_cost import grpo_bytes
from isoforward.model.kernels import use_kernels
from isoforward.model.optim import build
from isoforward.model.steps import Phase, unmeasured
from isoforward.serve.exact import refuse_inexact, use_exact
from isoforward.serve.rollout import roll_out

ROLLOUT = ("hand-over", "prefill", "decode", "sampling")
JUDGING = ("reward", "old policy", "reference policy")
PHASES = (*ROLLOUT, *JUDGING, *TRAINING, "residual")
USUAL, EXACT = "usual", "exact"  # ways of rollout
HOPELESS = 5  # first steps after which a reward that was always 0 is told


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one step: every prompt is answered `group` times."""

    prompts: int = 8
    group: int = 16
    prompt: int = 8  # tokens of one
    new_tokens: int = 16  # of an answer
    epochs: int = 1

    def __post_init__(self) -> None:
        for key in ("prompts", "prompt", "new_tokens", "epochs"):
            at_least(key, getattr(self, key), 1)
        at_least("group", self.group, 2)  # one answer alone is neither better nor worse than its group

    @property
    def batch(self) -> int:
        return self.prompts * self.group

    @property
    def length(self) -> int:
        """Tokens of each sequence that the update reads."""
        return self.prompt + self.new_tokens - 1

    def conditions(self, case: Case) -> dict[str, Condition]:
        told: dict[str, Condition] = {"batch": self.batch, "group": self.group, "prompt": self.prompt}
        return case.conditions(**told, new_tokens=self.new_tokens, epochs=self.epochs)

    def draw_prompts(self, vocabulary: int, generator: torch.Generator, device: str) -> Tensor:
        drawn = torch.randint(vocabulary, (self.prompts, self.prompt), generator=generator)
        return drawn.repeat_interleave(self.group, dim=0).to(device)  # (B, P)


class Loop:
    """A policy, what it is compared with, and the steps that change it.

    An `exact` one samples with the bits of training's forward, or is a BadInput where they are not to be had.
    """

    def __init__(self, case: Case, shape: Shape, reward: Reward, *, exact: bool = False) -> None:
        self.case, self.shape, self.reward = case, shape, reward
        self.policy = master_of(case)
        self.reference = freeze(self.policy)
        self.optimizer = build(self.policy, case.optim)
        self.plan = Plan(group=shape.group, epochs=shape.epochs, clip=case.optim.clip)
        self.generator = torch.Generator().manual_seed(case.seed)
        self.drawing = torch.Generator(case.device).manual_seed(case.seed)
        self.prompts = self.another_prompt()
        self.rows = 0
        if exact:
            refuse_inexact({f"device={case.device}": case.device != "cpu"})
            self.rows = use_exact(freeze(self.policy))

    def another_prompt(self) -> Tensor:
        return self.shape.draw_prompts(self.case.model.vocabulary, self.generator, self.case.device)

    def sample(self, policy: GPT, prompts: Tensor, phase: Phase = unmeasured) -> Rollout:
        """Serving answers, with weights as it holds them: cast, packed, frozen."""
        with phase("hand-over"):
            served = freeze(policy)
            if self.rows:
                use_exact(served, self.rows)
            else:
                use_kernels(served, self.case.kernels)
        asked = {"new_tokens": self.shape.new_tokens, "exact": self.rows}
        return roll_out(served, prompts, **asked, generator=self.drawing, phase=phase)

    def step(self, phase: Phase = unmeasured) -> Outcome:
        return grpo_step(
            self.policy,
            self.optimizer,
            self.prompts,
            sample=self.sample,
            reward=self.reward,
            reference=self.reference,
            plan=self.plan,
            phase=phase,
        )

    def part(self, phase: str) -> Part:
        life = "inference" if phase in (*ROLLOUT, "rollout") else "training"
        return Part(life=life, phase=phase, per="step", conditions=self.shape.conditions(self.case))


def bench(case: Case, shapes: Sequence[Shape], reward: Reward) -> Bench:
    """Every phase under each shape; the first one's whole step against a supervised step on the same tokens, and its
    rollout as usual and with training's bits. BadInput for a reward that is always 0.
    """
    rewards_of(case, shapes[0], reward, HOPELESS)
    loops = [Loop(case, shape, reward) for shape in shapes]
    works = [phased(case.clock, {phase: loop.part(phase) for phase in PHASES}, loop.step) for loop in loops]
    first = loops[0]
    whole = timed(case.clock, first.part("step"), first.step)
    supervised = supervised_works(case, shapes[0])
    ways, refusal = both_ways(case, shapes[0], reward)
    rollouts = [timed(case.clock, way.part("rollout"), partial(way.sample, way.policy, way.prompts)) for way in ways]

    def rows(measured: Measured) -> Iterator[Row]:
        for loop, work in zip(loops, works, strict=True):
            yield share_row(loop, work, measured)
            yield from counted_rows(loop)
        for way in ways:
            yield from importance_rows(way)
        if refusal is not None:
            about = first.part("old policy").labelled(way=EXACT).about
            yield case.row(about, unavailable(refusal), quantity="importance ratio")

    pairs = [(whole.part, supervised[-1].part)]
    if len(rollouts) == 2:
        pairs.append((rollouts[1].part, rollouts[0].part))
    return Bench(works=[*works, whole, *supervised, *rollouts], pairs=pairs, rows=rows)


def both_ways(case: Case, shape: Shape, reward: Reward) -> tuple[list[Loop], str | None]:
    """Loops that sample as usual and exactly, and why there is none of the latter.

    Their context is as long as the sequences, since what exact decoding has the bits of is a forward of that length.
    """
    own = replace(case, model=replace(case.model, context=shape.length))
    usual, exact = (replace(own, labels={**case.labels, "way": way}) for way in (USUAL, EXACT))
    loops = [Loop(usual, shape, reward)]
    try:
        loops.append(Loop(exact, shape, reward, exact=True))
    except BadInput as refusal:
        return loops, str(refusal)
    return loops, None


def supervised_works(case: Case, shape: Shape) -> list[Work]:
    """The phases of a step on the same tokens by next-token loss, and the whole of it. Its rows have no group."""
    own = replace(case, batch=shape.batch, length=shape.length)
    generator = torch.Generator().manual_seed(case.seed)
    text = torch.randint(case.model.vocabulary, (shape.batch, shape.length + 1), generator=generator).to(case.device)
    life = Training(own, master_of(case), text[:, :-1].contiguous(), text[:, 1:].contiguous())
    told = case.conditions(batch=shape.batch)
    return [
        replace(work, parts=tuple(replace(part, conditions=told) for part in work.parts))
        for work in (life.phased, life.whole)
    ]


def share_row(loop: Loop, work: Work, measured: Measured) -> Row:
    shares = [sum(times[: len(ROLLOUT)]) / sum(times) for times in measured.paired(*work.parts)]
    return loop.case.row(loop.part("step").about, derived_fields(shares), quantity="rollout")


def counted_rows(loop: Loop) -> Iterator[Row]:
    """FLOPs as they are dispatched in a real step, and the least bytes."""
    case, shape = loop.case, loop.shape
    flops = step_flops(loop)
    moved = grpo_bytes(
        case.model,
        batch=shape.batch,
        prompt=shape.prompt,
        new=shape.new_tokens,
        epochs=shape.epochs,
        dtype=case.precision,
        optimizer=case.rule,
    )
    for phase in PHASES[:-1]:
        about = loop.part(phase).about
        yield case.row(about, counted(flops.get(phase, 0)))
        if phase in moved:
            yield case.row(about, quantity="bytes", provenance="predicted", value=float(moved[phase]))


def step_flops(loop: Loop, convention: str = "model") -> dict[str, int]:
    scope = Scope(layers_of(loop.policy))
    with scope.following(), FlopCounter(scope, convention=convention) as counter:
        loop.step(scope)
    return by_phase(counter.flops)


def importance_rows(loop: Loop) -> Iterator[Row]:
    """Of the first step's tokens before an update: all 1 where decode has the bits of training's forward."""
    ratio = loop.step().importance.flatten()
    found = [("importance ratio", *each) for each in ends_of(ratio)]
    for quantity, statistic, value in [*found, ("difference", "largest", float(ratio.log().abs().max()))]:
        about = loop.part("old policy").labelled(statistic=statistic).about
        yield loop.case.row(about, quantity=quantity, value=value)


def memory_rows(case: Case, shape: Shape, reward: Reward) -> list[Row]:
    """Each phase's measured peak."""
    found = why_unreadable(case.device) or account_of(case, Rehearsed(shape, reward))
    lives = {phase: "inference" if phase in ROLLOUT else "training" for phase in PHASES[:-1]}
    about: RowFields = {"quantity": "memory", "per": "step", "conditions": shape.conditions(case)}
    if isinstance(found, str | Failed):
        why = found if isinstance(found, str) else found.reason
        return [case.row(about, unavailable(why), life="training", phase="step")]
    return [
        case.row(about, life=life, phase=phase, value=float(found.measured[phase])) for phase, life in lives.items()
    ]


@dataclass(frozen=True)
class Rehearsed:
    """Of a case, what `measure.memory` runs; small where the case is its tiny likeness."""

    shape: Shape
    reward: Reward

    def __call__(self, case: Case) -> Life:
        fits = case.model.context > self.shape.length
        loop = Loop(case, self.shape if fits else replace(self.shape, prompt=2, new_tokens=4), self.reward)
        return loop.step, lambda memory: Ledger(phases={}, retained={})


# Learning


def rewards_of(case: Case, shape: Shape, reward: Reward, steps: int) -> tuple[list[float], list[float]]:
    """Mean reward of each step's answers, and the seconds until it was there. BadInput where it is always 0."""
    loop = Loop(case, shape, reward)
    loop.policy.train()
    means: list[float] = []
    spent_s: list[float] = []
    begun = time.perf_counter()
    for _ in range(steps):
        loop.prompts = loop.another_prompt()
        means.append(float(loop.step().rewards.mean()))
        spent_s.append(time.perf_counter() - begun)
        if len(means) == HOPELESS and not any(means):
            raise BadInput(
                f"the reward was 0 for all {HOPELESS * shape.batch} answers of the first {HOPELESS} steps, and from "
                "nothing nothing is learnt; take a reward that also counts what is partly right, shorter answers "
                "(new_tokens=) or a larger group="
            )
    return means, spent_s
