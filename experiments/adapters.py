"""Why is LoRA with 0.1 % of the parameters not a thousand times faster, and what does training a part of a model save?

    python experiments/adapters.py
    python experiments/adapters.py model=small ranks=[8] targets=[q,v]
    python experiments/adapters.py model=hf model.path=DIR steps=0

Full training, the head alone, and low-rank maps of several ranks, on the same weights; those of the first rank over a
base in int8 too. Training: time, FLOPs, memory and optimizer state of each phase. Serving: the adapter beside its base,
and merged. Then each way goes on from the same base, trained on Shakespeare, with the same text in the other case (TO
BE, OR NOT), and the loss that all of them reach is told in seconds and in joules, or in FLOPs where no energy can be
read; steps=0 leaves that out. Low-rank maps learn at lora_lr times optim.lr (Schulman 2025, "LoRA without regret":
about 10).

A backward pass is two products for each one of the forward: the gradient of the weight and that of the input. A frozen
weight needs no gradient of its own, so that backward is 1 and not 2, but the gradient still passes through it, down to
the first thing that is trained, and what the forward computed is kept for that.

:chapter: Training
"""

import copy
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from rich.console import Console

from isoforward.app.command_line import run
from isoforward.app.question import asking, at_most, case_of
from isoforward.base import units
from isoforward.base.checks import at_least
from isoforward.base.config import AdapterConfig, DataConfig, ExperimentConfig, TrainConfig, TrainerConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, only, select
from isoforward.base.terminal import say
from isoforward.data.corpus import Corpus, prepare
from isoforward.formats.export import freeze
from isoforward.measure.benchmark import Measured, Work, part_by_part
from isoforward.measure.case import Case, batch_of, frozen_of, master_of
from isoforward.measure.energy import open_reader
from isoforward.measure.learning_curves import MARKS, Point, at_loss, flops_curve, learning_curve, loss_rows
from isoforward.measure.memory import account_rows
from isoforward.measure.passes import Bench, call_apart
from isoforward.measure.train_and_serve import Serving, energy_row, training_flops
from isoforward.measure.variants import bench as training_bench
from isoforward.measure.variants import state_row
from isoforward.model.adapter_cost import adapted_maps, trained_parameters
from isoforward.model.adapters import AdaptedLinear, adapt, linears_of
from isoforward.model.gpt import GPT
from isoforward.model.kernels import use_kernels

FULL = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(ExperimentConfig):
    ranks: list[int] = dataclasses.field(default_factory=lambda: [4, 16, 64])
    targets: list[str] = dataclasses.field(default_factory=list)  # of low-rank maps: q, k, v, out, ...; none: all
    steps: int = 100  # of each training, and twice as many of the base; 0: none is trained
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    lora_lr: float = 10.0  # times optim.lr

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("ranks", len(self.ranks), 1)
        for rank in self.ranks:
            at_least("ranks", rank, 1)
        if 0 < self.steps < MARKS:
            raise BadInput(
                f"steps={self.steps} are too few to see learning; write steps={MARKS} or more, or 0 for none"
            )
        at_least("steps", self.steps, 0)
        at_least("lora_lr", self.lora_lr, 0)


def ways(case: Case, config: Adapters) -> list[Case]:
    lora = [AdapterConfig(name="lora", rank=rank, targets=config.targets) for rank in config.ranks]
    narrow = adapted_maps(case.model, AdapterConfig(name="lora", rank=1, targets=config.targets))
    width = min(min(each.inputs, each.outputs) for each in narrow)
    if max(config.ranks) > width:  # before anything is measured
        low = [rank for rank in config.ranks if rank <= width] or [width]
        told = ",".join(map(str, low))
        raise BadInput(f"ranks: {max(config.ranks)} is above the width of a map, {width}; write ranks=[{told}]")
    lora.append(dataclasses.replace(lora[0], base="int8"))
    parts = [dataclasses.replace(case, adapter=each) for each in (AdapterConfig(name="frozen"), *lora)]
    return [dataclasses.replace(case, labels={"adapter": FULL}), *parts]


def way_of(case: Case) -> str:
    return str(case.conditions()["adapter"])


def bench(first: Case, cases: Sequence[Case]) -> Bench:
    """Training in every way against full training, and serving beside the base against merged."""
    training = training_bench(first, cases)
    lora = [case for case in cases if case.adapter.name == "lora"]
    served = [serving(case) for case in lora]
    pairs = [pair for beside, merged in served for pair in part_by_part(beside, merged)]

    def rows(measured: Measured) -> Iterator[Row]:
        yield from training.rows(measured)
        yield from energies(first, cases, training.works[1::2])
        for case in lora:
            yield difference(case)

    works = [work for each in served for side in each for work in side]
    return Bench(works=[*training.works, *works], pairs=[*training.pairs, *pairs], rows=rows)


def energies(first: Case, cases: Sequence[Case], wholes: Sequence[Work]) -> Iterator[Row]:
    """Of a training step in each way; none where no energy can be read."""
    reader = open_reader(first.measure.energy, torch.device(first.device))
    rows = (energy_row(case, reader, whole, whole.part) for case, whole in zip(cases, wholes, strict=True))
    yield from (row for row in rows if row.value is not None)


def trained_like(case: Case) -> GPT:
    """With a B that is not 0, as training would leave it."""
    master = master_of(case)
    generator = torch.Generator().manual_seed(case.seed)
    for _, layer in linears_of(master, AdaptedLinear):
        for beside in layer.pairs().values():
            with torch.no_grad():
                beside.b.copy_(torch.randn(beside.b.shape, generator=generator) * 0.02)
    return master


def serving(case: Case) -> tuple[list[Work], list[Work]]:
    """The forward of training's batch and a generation: the adapter beside the base, and merged."""
    master, (tokens, _) = trained_like(case), batch_of(case)
    beside, merged = freeze(master), frozen_of(case, master)
    use_kernels(beside, case.kernels)
    sides: dict[str, list[Work]] = {"beside": [], "merged": []}
    for how, frozen in zip(sides, (beside, merged), strict=True):
        life = Serving(case, frozen, tokens)
        told = case.conditions(how=how)  # few, so that they stand in one table with training's
        for work in (life.forward, life.generation):
            parts = tuple(dataclasses.replace(part, conditions=told) for part in work.parts)
            sides[how].append(dataclasses.replace(work, parts=parts))
    return sides["beside"], sides["merged"]


def difference(case: Case) -> Row:
    """Of the logits, at most, between the adapter beside its base and merged."""
    master, (tokens, _) = trained_like(case), batch_of(case)
    with torch.inference_mode():
        apart = (freeze(master)(tokens[:1]).float() - frozen_of(case, master)(tokens[:1]).float()).abs().max()
    about: RowFields = {
        "life": "inference",
        "phase": "forward",
        "quantity": "difference",
        "unit": "logit",
        "per": "token",
    }
    return case.row(about, value=float(apart), conditions=case.conditions(compared="merged and beside"))


# Learning


def other_case(corpus: Corpus) -> Corpus:
    """TO BE, OR NOT: every letter in the other case, where the tokenizer has it."""
    backend = corpus.tokenizer.backend
    known = [backend.id_to_token(token) or "" for token in range(corpus.tokenizer.vocabulary)]
    turned = np.array([known.index(text.swapcase()) if text.swapcase() in known else n for n, text in enumerate(known)])
    return dataclasses.replace(corpus, train=turned[corpus.train], validation=turned[corpus.validation])


def learn(cases: list[Case], config: Adapters) -> list[Row]:
    """State, and the curves of each way from the same base, under every seed."""
    rows = [state_row(case) for case in cases]
    if not config.steps:
        return rows
    data = DataConfig(tokenizer="char", length=cases[0].length, batch=cases[0].batch)
    corpus = prepare(data)
    turned = other_case(corpus)
    curves: dict[str, list[list[Point]]] = {way_of(case): [] for case in cases}
    sized = dataclasses.replace(cases[0].model, vocab=corpus.tokenizer.vocabulary)
    for seed in config.seeds:
        plan = TrainConfig(
            model=sized, data=data, optim=config.optim, trainer=TrainerConfig(max_steps=2 * config.steps)
        )
        torch.manual_seed(seed)
        base = GPT(sized)
        learning_curve(plan, corpus, seed=seed, model=base, length=data.length, marks=MARKS)
        for case in cases:
            lr = config.optim.lr * (config.lora_lr if case.adapter.name == "lora" else 1)
            own = dataclasses.replace(
                plan,
                optim=dataclasses.replace(config.optim, lr=lr, warmup_steps=0),
                trainer=TrainerConfig(max_steps=config.steps),
            )
            torch.manual_seed(seed)  # maps of one rank begin alike, whatever lies beside them
            model = adapt(copy.deepcopy(base), case.adapter)
            curves[way_of(case)].append(
                learning_curve(own, turned, seed=seed, model=model, length=data.length, marks=MARKS)
            )
    for case in cases:
        name = way_of(case)
        yielded = dataclasses.replace(case, model=sized)
        rows += loss_rows(case, curves[name], adapter=name)
        rows += flops_curve(case, curves[name], sum(training_flops(yielded, "model").values()), adapter=name)
    return rows


# What is said


def bought(results: Results, names: Iterable[str]) -> dict[str, str]:
    """What each way spends until the loss that all of them reach: seconds, and joules where known, or else FLOPs."""
    curves = {name: select(results, quantity="loss", adapter=name) for name in names}
    if not all(curves.values()):
        return {}
    goal = max(min(row.number for row in curve) for curve in curves.values())
    told = {}
    for name, curve in curves.items():
        spent_s, steps = (at_loss(curve, setting, goal) for setting in ("training_time_s", "step"))
        gflop = at_loss(select(results, quantity="loss_by_flops", adapter=name), "training_gflop", goal)
        assert spent_s is not None and steps is not None and gflop is not None
        energy = select(results, quantity="energy", adapter=name)
        paid = units.count(steps * energy[0].number, "J") if energy else units.count(gflop * 1e9, "FLOP")
        told[name] = f"{goal:.3f} nats in {units.seconds(spent_s)} and {paid}"
    return told


def answer(results: Results) -> str:
    forward = only(results, life="training", phase="forward", quantity="flops", adapter=FULL).number
    held = {
        row.conditions["adapter"]: row.value
        for row in select(results, quantity="memory", category="measured peak")
        if row.value is not None
    }
    state = {row.conditions["adapter"]: row.number for row in select(results, quantity="state")}
    steps = {
        str(row.conditions["adapter"]): row for row in select(results, quantity="time", phase="step", life="training")
    }
    spent, told = bought(results, steps), []
    for name, step in steps.items():
        passes = [
            only(results, life="training", phase=phase, quantity="flops", adapter=name).number / forward
            for phase in ("forward", "backward")
        ]
        said = f"{name}: forward {passes[0]:.2f}, backward {passes[1]:.2f}, optimizer state {units.size(state[name])}"
        if name in held and FULL in held:
            said += f", memory {units.times(held[name] / held[FULL])}"
        if name != FULL:
            said += f", step {results.judge(step, steps[FULL]).sentence()}"
        told.append(f"{said}, {spent[name]}" if name in spent else said)
    apart = max(row.number for row in select(results, quantity="difference", compared="merged and beside"))
    return (
        f"Of a full step's forward, in FLOPs: {'; '.join(told)}. Frozen weights save their own gradients, not the "
        f"way through them. Merging moves logits by {apart:.0e} at most."
    )


def main(config: Adapters) -> None:
    if config.steps:
        vocab = prepare(DataConfig(tokenizer="char", length=config.data.length)).tokenizer.vocabulary
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=config.model.vocab or vocab))
    cases = ways(case_of(config, "adapters"), config)
    for case in cases:
        trained = trained_parameters(case.model, case.adapter)
        say(Console(), f"{way_of(case)}: {trained:,} parameters are trained")
    with asking(config, answer) as run:
        run.say(f"measuring adapters{at_most(config.measure)}, then memory, then training in each way")
        run.measure(cases[0], bench, cases)
        for case in cases:
            run.add(account_rows(case, "training"))
        run.add(call_apart(learn, cases, config, threads=cases[0].threads, what="training"))


if __name__ == "__main__":
    sys.exit(run(main, Adapters))
