"""Both lives of one model: time, FLOPs, bytes, memory and energy of every phase, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isoforward.base.config import AdapterConfig
from isoforward.base.results import Row, RowFields
from isoforward.base.vocabulary import CONVENTIONS, TRAINING, Condition
from isoforward.measure import flops
from isoforward.measure.benchmark import Measured, Pair, Part, Work, phased, timed
from isoforward.measure.case import Case, batch_of, counted, frozen_of, identity_row, master_of
from isoforward.measure.energy import EnergyReader, open_reader
from isoforward.measure.passes import Bench, derived
from isoforward.model import footprint, steps
from isoforward.model.cost import Lengths
from isoforward.model.gpt import KVCache
from isoforward.model.optim import build
from isoforward.serve.compiled import StaticKVCache, compiled_decode

USUAL_OPTIMIZER = "adamw"


def bench(case: Case) -> Bench:
    """Of our own model: every phase of both lives, and all that is counted beside."""
    master = master_of(case)
    frozen = frozen_of(case, master)
    tokens, targets = batch_of(case)
    identity = identity_row(case, master, frozen, tokens[:1])
    training, serving = Training(case, master, tokens, targets), Serving(case, frozen, tokens)
    usual = [Training(beside, master, tokens, targets) for beside in with_usual_optimizer(case)]
    return bench_of(case, identity, training, serving, lambda: [*flop_rows(case), *byte_rows(case)], usual)


def with_usual_optimizer(case: Case) -> list[Case]:
    """What a step costs should be told of the optimizer that most people use, whatever the weights were trained by."""
    if case.optim.name == USUAL_OPTIMIZER:
        return []
    labels = {**case.labels, "in_place_of": case.optim.name}
    return [replace(case, optim=replace(case.optim, name=USUAL_OPTIMIZER), labels=labels)]


def bench_of(
    case: Case,
    identity: Row,
    training: Training,
    serving: Serving,
    beside: Callable[[], Iterable[Row]],
    usual: Sequence[Training] = (),
) -> Bench:
    """Of any model: what is timed and compared, and what rows there are `beside`. Of `usual`, the whole step."""

    def rows(measured: Measured) -> Iterator[Row]:
        yield identity
        yield residual_row(case, training, measured)
        yield from beside()
        yield from energy_rows(case, training, serving)

    wholes = [training.whole, *(each.whole for each in usual)]
    works = [training.phased, *wholes, serving.forward, serving.generation, *serving.curve]
    pairs = [*pairs_of(training, serving), *((each.part("step"), serving.part("forward")) for each in usual)]
    return Bench(works=works, pairs=pairs, rows=rows)


def pairs_of(training: Training, serving: Serving) -> list[Pair]:
    """Every phase against the frozen forward on the same batch, and the phases against the unphased step."""
    (forward,) = serving.forward.parts
    (whole,) = training.whole.parts
    against = [(part, forward) for part in training.phased.parts]
    return [*against, (whole, forward), (training.phased.parts[0], whole)]


class Training:
    """A phased step for the parts, and an unphased one, which knows nothing of the meter, for the whole."""

    def __init__(
        self, case: Case, master: Any, tokens: Tensor, targets: Tensor, *, optimizer: Optimizer | None = None
    ) -> None:
        optimizer = optimizer or build(master, case.optim)
        if case.compile:
            master.compile_blocks()

        def step(phase: steps.Phase = steps.unmeasured) -> None:
            steps.train_step(
                master, optimizer, tokens, targets, accumulate=case.accumulate, clip=case.optim.clip, phase=phase
            )

        self.step = step
        self.phased = phased(case.clock, {phase: case.step(phase) for phase in TRAINING}, step)
        self.whole = timed(case.clock, case.step("step"), step)

    def part(self, phase: str) -> Part:
        """A phase, or the whole `step`."""
        return next(part for part in (*self.phased.parts, *self.whole.parts) if part.phase == phase)


class Serving:
    """The forward on training's batch, a generation, and one more token by context, with a KV cache and without.

    What `compile` compiles is that forward and, of our own model, the step that decodes. `cache` is another than ours,
    of a model that is not ours.
    """

    def __init__(self, case: Case, frozen: Any, tokens: Tensor, *, cache: Any = None) -> None:
        self.case, self.frozen, self.tokens = case, frozen, tokens
        model: Callable[[Tensor], Tensor] = torch.compile(frozen) if case.compile else frozen
        reach = max(case.contexts[-1], case.prompt + case.new_tokens)  # what is measured, not what the model could do
        self.text = tokens.flatten().repeat(-(-reach // tokens.numel()))[None]  # (1, at least reach)
        self.token = tokens.flatten()[:1, None]  # laid out as a chosen one is: a compiled step would tell them apart
        self.decode_step: Callable[..., Tensor] = steps.decode
        if cache is None:
            cache = KVCache(case.model, batch=1, capacity=reach, dtype=frozen.dtype, device=tokens.device)
            cache.fill(0)  # the curve looks at positions that no prompt filled: NaN would be slow arithmetic
        self.cache = self.past = cache  # what prefill fills, and what decoding goes on from
        if case.compile and isinstance(cache, KVCache):
            self.decode_step, self.past = compiled_decode(tokens.device.type), StaticKVCache(cache)
        self.forward = timed(case.clock, case.serve("forward"), torch.inference_mode()(lambda: model(tokens)))
        self.generation = self._generation()

    @property
    def curve(self) -> list[Work]:
        """One more token at each context: with the past kept, and with all of the text sent through again."""
        contexts = self.case.contexts
        return [self.cached(context) for context in contexts] + [self.uncached(context) for context in contexts]

    def part(self, phase: str) -> Part:
        return next(part for part in (*self.forward.parts, *self.generation.parts) if part.phase == phase)

    def _generation(self) -> Work:
        """TTFT is prefill; TPOT the mean over the tokens decoded after it."""
        case, clock = self.case, self.case.clock
        parts = case.serve("prefill"), case.serve("decode")

        def run(n: int) -> Sequence[float]:
            prefill_s = decode_s = 0.0
            for _ in range(n):
                self.cache.rewind(0)
                start = clock.mark()
                steps.prefill(self.frozen, self.text[:, : case.prompt], self.cache)
                middle = clock.mark()
                clock.settle()
                if self.past is not self.cache:
                    self.past.rewind(self.cache.length)  # it holds the same keys and values
                chosen, again = self.token, clock.mark()
                for _ in range(case.new_tokens - 1):
                    chosen = self.decode_step(self.frozen, chosen, self.past).argmax(-1, keepdim=True)
                end = clock.mark()
                clock.settle()
                prefill_s += clock.seconds(start, middle)
                decode_s += clock.seconds(again, end)
            return prefill_s / n, decode_s / (n * (case.new_tokens - 1))

        return Work(parts=parts, run=run)

    def cached(self, context: int) -> Work:
        """Decode steps around `context`: the n of a sample start n/2 before it, and each goes on from the last."""
        part = self.case.after(context, cache=True)

        def prepare(n: int) -> None:
            self.past.rewind(max(0, min(context - 1 - n // 2, self.case.contexts[-1] - n)))

        def decode() -> object:
            return self.decode_step(self.frozen, self.token, self.past)

        return timed(self.case.clock, part, decode, prepare=prepare, most=max(1, context // 2))

    def uncached(self, context: int) -> Work:
        part = self.case.after(context, cache=False)
        return timed(self.case.clock, part, lambda: steps.decode_uncached(self.frozen, self.text[:, :context]))


def residual_row(case: Case, training: Training, measured: Measured) -> Row:
    """What the unphased step takes more than its phases, pair by pair."""
    paired = measured.paired(training.part("step"), *training.phased.parts)
    return derived(case, case.step("residual"), [whole - sum(parts) for whole, *parts in paired])


def training_flops(case: Case, convention: str) -> dict[str, int]:
    return flops.count_training(
        case.model,
        batch=case.batch,
        length=case.length,
        accumulate=case.accumulate,
        checkpointing=case.checkpointing,
        convention=convention,
        optim=case.optim,
        adapter=case.adapter,
    )


def training_flop_rows(case: Case, convention: str) -> Iterator[Row]:
    found = training_flops(case, convention)
    for phase in TRAINING:
        yield case.row(case.step(phase).about, counted(found.get(phase, 0), convention))


def flop_rows(case: Case) -> Iterator[Row]:
    """Counted by dispatch on the meta device, under each convention."""
    middle, served = case.prompt + case.new_tokens // 2, replace(case, adapter=AdapterConfig())
    for convention in CONVENTIONS:
        yield from training_flop_rows(case, convention)
        found = {
            "forward": training_flops(served, convention)["forward"],
            "prefill": flops.count_prefill(case.model, batch=1, length=case.prompt, convention=convention),
            "decode": flops.count_decode(case.model, batch=1, cached=middle, convention=convention),
        }
        for phase, count in found.items():
            yield case.row(case.serve(phase).about, counted(count, convention))
        for context in case.contexts:
            yield from context_flop_rows(case, context, convention)


def context_flop_rows(case: Case, context: int, convention: str) -> Iterator[Row]:
    kept = flops.count_decode(case.model, batch=1, cached=context - 1, convention=convention)
    again = flops.count_decode_uncached(case.model, batch=1, length=context, convention=convention)
    for cache, count in ((True, kept), (False, again)):
        yield case.row(case.after(context, cache=cache).about, counted(count, convention))


def byte_rows(case: Case) -> Iterator[Row]:
    """The least traffic that each phase needs: what no cache of the machine can spare it."""
    size, dtype = Lengths(batch=case.batch, length=case.length), case.precision
    serve = partial(footprint.inference_bytes, case.model, batch=1, dtype=dtype)
    moved: dict[Part, int] = {}
    if case.adapter.name == "none":
        training = footprint.training_bytes(
            case.model, **size, dtype=dtype, optimizer=case.rule, checkpointing=case.checkpointing
        )
        moved = {case.step(phase): count for phase, count in training.items()}
    moved[case.serve("forward")] = footprint.forward_bytes(case.model, **size, dtype=dtype).total
    moved[case.serve("prefill")] = serve(length=case.prompt).total
    moved[case.serve("decode")] = serve(cached=case.prompt + case.new_tokens // 2).total
    for part, count in moved.items():
        yield case.row(part.about, quantity="bytes", provenance="predicted", value=float(count))


def energy_rows(case: Case, training: Training, serving: Serving) -> Iterator[Row]:
    """Of a whole training step and of a whole generation, each repeated inside one window."""
    reader = open_reader(case.measure.energy, torch.device(case.device))
    generated: dict[str, Condition] = {**case.decoding(), "tokens": case.new_tokens}
    whole = Part(life="inference", phase="run", per="sequence", conditions=generated)
    for work, part in ((training.whole, training.whole.part), (serving.generation, whole)):
        yield energy_row(case, reader, work, part)


def energy_row(case: Case, reader: EnergyReader, work: Work, part: Part) -> Row:
    energy = reader.window(partial(work.run, 1))
    how: RowFields = {"provenance": energy.provenance, "reason": energy.reason}
    return case.row(part.about, how, quantity="energy", value=energy.energy_j)
