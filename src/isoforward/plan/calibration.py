"""What this machine takes for each operator of a GPT: timed where it runs, for forecast.py to read between.

Small models train and generate, and each operator that they dispatch is timed in its place: with the caches and the
memory that its neighbours leave it, on operands that lie as they lie there. Alone and over and over, a kernel finds
everything at hand and says too little. Beside that the same phases run with nothing timed inside them: what they take
beyond their operators is laid to each operator dispatched (autograd, Python). An optimizer's operators take all
parameters at once; they alone are timed apart, parameter by parameter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean, median

import numpy as np
import torch

from isoforward.base.config import MeasureConfig, ModelConfig
from isoforward.base.datasheets import Hardware
from isoforward.base.environment import environment
from isoforward.base.malloc import keep_freed_pages
from isoforward.base.subprocesses import Failed
from isoforward.formats.export import freeze
from isoforward.measure.benchmark import Part, Work, measure
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.memory import account
from isoforward.measure.operators import Operator, Recorder
from isoforward.measure.operators import Work as Recorded
from isoforward.measure.train_and_serve import Serving, Training
from isoforward.measure.trust import Findings, findings
from isoforward.model import steps
from isoforward.model.gpt import KVCache
from isoforward.model.optim import build
from isoforward.plan.collectives import all_reduce
from isoforward.plan.forecast import PHASES, Beyond, Calibrated, resident, works_of
from isoforward.plan.microbenchmarks import copying, most_flops, optimizer_calls, reading, time_operators
from isoforward.serve.inference import DTYPES

TOLD = tuple(phase for life in PHASES.values() for phase in life)
Shape = tuple[str, int, int, int, int, int, str, int]  # family, width, head width, layers, batch, length, dtype, prompt
REFERENCE: Shape = ("gpt2", 384, 64, 2, 2, 128, "fp32", 48)
REFERRED = ("forward", "backward", "prefill", "decode")
SAMPLES: tuple[Shape, ...] = (
    ("gpt2", 96, 32, 2, 1, 64, "fp32", 32),
    ("llama", 96, 32, 2, 16, 128, "fp32", 96),
    ("gpt2", 96, 32, 2, 32, 128, "fp32", 48),
    ("gpt2", 160, 32, 3, 2, 96, "fp32", 64),
    ("llama", 160, 32, 4, 8, 256, "fp32", 32),
    ("gpt2", 160, 32, 3, 1, 800, "fp32", 48),
    ("llama", 256, 32, 2, 1, 64, "fp32", 48),
    ("gpt2", 256, 64, 4, 4, 384, "fp32", 32),
    ("llama", 256, 64, 2, 8, 256, "fp32", 96),
    ("gpt2", 448, 64, 2, 1, 128, "fp32", 64),
    ("llama", 448, 32, 2, 2, 320, "fp32", 32),
    ("gpt2", 448, 64, 2, 4, 320, "fp32", 96),
    ("llama", 640, 64, 2, 1, 96, "fp32", 48),
    ("gpt2", 640, 64, 2, 4, 96, "fp32", 32),
    ("gpt2", 1024, 64, 2, 1, 64, "fp32", 64),
    ("llama", 1024, 64, 2, 2, 96, "fp32", 32),
    ("llama", 96, 32, 2, 1, 64, "bf16", 32),
    ("gpt2", 96, 32, 3, 8, 128, "bf16", 64),
    ("gpt2", 160, 32, 2, 1, 96, "bf16", 48),
    ("llama", 160, 32, 3, 4, 192, "bf16", 32),
    ("gpt2", 256, 64, 2, 1, 64, "bf16", 64),
    ("llama", 256, 64, 2, 2, 192, "bf16", 48),
    ("llama", 448, 64, 2, 1, 64, "bf16", 64),
    ("gpt2", 448, 64, 2, 1, 256, "bf16", 32),
    ("gpt2", 640, 64, 2, 1, 64, "bf16", 48),
    ("llama", 640, 64, 2, 1, 160, "bf16", 64),
    ("llama", 1024, 64, 2, 1, 64, "bf16", 32),
    ("gpt2", 1024, 64, 2, 1, 32, "bf16", 48),
)
BUFFERED: tuple[Shape, ...] = (
    REFERENCE,
    ("llama", 256, 64, 2, 2, 192, "bf16", 48),
)  # of each dtype, for what kernels keep
PLAN = MeasureConfig(repeats=5, warmup=1)
MOST_IN_PLACE = 4  # executions in one sample
STRAY = 3  # times the median: what a sample counts as at most, an interruption being no operator's own


def sample(shape: Shape) -> Case:
    family, width, head_width, layers, batch, length, dtype, prompt = shape
    heads = width // head_width
    context = max(length, prompt + 16)
    model = ModelConfig(family=family, width=width, heads=heads, layers=layers, vocab=1024, context=context)
    settings = MeasureConfig(prompt=prompt, new_tokens=9)
    return Case(
        experiment="calibrate",
        model=model,
        batch=batch,
        length=length,
        precision=dtype,
        threads=torch.get_num_threads(),
        measure=settings,
    )


def runs_of(case: Case) -> tuple[Training, Serving, Callable[[], Recorder]]:
    """A training step, a generation, and the same with every operator timed where it runs."""
    keep_freed_pages()  # as training does; a process that has freed a large block keeps them too
    master = master_of(case)
    tokens, targets = batch_of(case)
    optimizer, frozen = build(master, case.optim), freeze(master)
    cache = KVCache(case.model, batch=1, capacity=case.model.context, dtype=frozen.dtype)
    text = tokens.flatten().repeat(-(-case.model.context // tokens.numel()))[None]
    training = Training(case, master, tokens, targets, optimizer=optimizer)
    serving = Serving(case, frozen, tokens, cache=cache)

    def in_place() -> Recorder:
        recorder = Recorder(timing=True)
        with recorder:
            steps.train_step(master, optimizer, tokens, targets, clip=case.optim.clip, phase=recorder)
            cache.rewind(0)
            steps.prefill(frozen, text[:, : case.prompt], cache, phase=recorder)
            for _ in range(case.new_tokens - 1):
                with recorder("decode"):
                    steps.decode(frozen, text[:, :1], cache).argmax(-1, keepdim=True)
        return recorder

    return training, serving, in_place


def reference() -> tuple[Work, Work]:
    """A model that never changes: what its phases take is the machine's pace."""
    training, serving, _ = runs_of(sample(REFERENCE))
    return training.phased, serving.generation


def operators_in_place(in_place: Callable[[], Recorder]) -> tuple[Work, dict[Part, tuple[str, Operator]], Recorder]:
    """A step and a generation with every operator timed where it runs, each a part of it; and one that was recorded."""
    in_place()  # Adam's state appears
    first = in_place()
    life = {phase: life for life, phases in PHASES.items() for phase in phases}
    parts = {
        Part(life=life[phase], phase=phase, per="step", conditions={"operator": operator.kind}): (phase, operator)
        for phase, counts in first.took_s.items()
        if phase in TOLD
        for operator in counts
    }

    def run(n: int) -> list[float]:
        took = [in_place().took_s for _ in range(n)]
        return [usual([s for each in took for s in each[phase][operator]]) for phase, operator in parts.values()]

    return Work(parts=tuple(parts), run=run, most=MOST_IN_PLACE), parts, first


def pace(now_s: Mapping[str, float], then_s: Mapping[str, float]) -> float:
    """How much longer the machine takes than it did: the median over phases, of which an interruption hits one."""
    return median(now_s[phase] / then_s[phase] for phase in then_s)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One sample, by phase, in seconds as it was timed."""

    case: Case
    took_s: Mapping[str, float]
    operators_s: Mapping[str, Mapping[Operator, float]]
    works: Mapping[str, Recorded]
    reference_s: Mapping[str, float]


def observed(shape: Shape, beside: tuple[Work, Work]) -> tuple[Seen, Findings]:
    """Through the one runner, each of our two works right beside the same of the model that never changes."""
    case = sample(shape)
    training, serving, in_place = runs_of(case)
    ours = (training.phased, serving.generation)
    operators, places, recorder = operators_in_place(in_place)
    pairs = [(one.parts[0], other.parts[0]) for one, other in zip(ours, beside, strict=True)]
    measured = measure([*ours, *beside, operators], pairs, PLAN, seed=case.seed)

    def medians(works: Sequence[Work]) -> dict[str, float]:
        return {part.phase: float(measured.estimate(part).median) for work in works for part in work.parts}

    times = {"decode": case.new_tokens - 1}
    works = {
        phase: Recorded(
            counts={operator: n / times.get(phase, 1) for operator, n in work.counts.items()},
            dispatched=work.dispatched // times.get(phase, 1),
        )
        for phase, work in recorder.works().items()
    }
    operators_s: defaultdict[str, dict[Operator, float]] = defaultdict(dict)
    for part, (phase, operator) in places.items():
        operators_s[phase][operator] = usual(measured.estimate(part).samples)
    reference_s = {phase: time_s for phase, time_s in medians(beside).items() if phase in REFERRED}
    seen = Seen(case=case, took_s=medians(ours), operators_s=operators_s, works=works, reference_s=reference_s)
    return seen, findings(measured)


def usual(samples_s: Sequence[float]) -> float:
    """The mean, which adds up to what all take together; no median does."""
    most = STRAY * median(samples_s)
    return mean(min(each, most) for each in samples_s)


def points_of(seen: list[Seen], paces: list[float]) -> defaultdict[str, list[list[float]]]:
    """By kind of operator: its size, and seconds a unit of work at the common pace."""
    points = defaultdict(list)
    for each, slower in zip(seen, paces, strict=True):
        for phase, took_s in each.operators_s.items():
            if phase != "optimizer":
                for operator, time_s in took_s.items():
                    points[operator.kind].append([*operator.size, time_s / operator.work / slower])
    return points


def beyond(alone_s: Sequence[float], dispatched: Sequence[float], took_s: Sequence[float]) -> Beyond:
    """Of operators that were timed apart: the least relative squares, neither part below nothing."""
    took = np.array(took_s)
    parts = np.stack([np.array(alone_s), np.array(dispatched)], axis=1) / took[:, None]
    scale, dispatch_s = np.linalg.lstsq(parts, np.ones(len(took)), rcond=None)[0]
    if dispatch_s < 0:
        return Beyond(scale=float(parts[:, 0].sum() / (parts[:, 0] ** 2).sum()), dispatch_s=0.0)
    return Beyond(scale=float(scale), dispatch_s=float(dispatch_s))


def around(
    in_place_s: Sequence[float], dispatched: Sequence[float], timed: Sequence[float], took_s: Sequence[float]
) -> Beyond:
    """Of operators that were timed in their place: what dispatching adds to each, and timing had added.

    The least relative squares, neither below nothing.
    """
    took = np.array(took_s)
    parts = np.stack([np.array(dispatched), -np.array(timed)], axis=1) / took[:, None]
    rest = 1 - np.array(in_place_s) / took
    found = np.linalg.lstsq(parts, rest, rcond=None)[0]
    for one, other in ((0, 1), (1, 0)):
        if found[one] < 0:
            part = parts[:, other]
            found[one], found[other] = 0, max(0, part @ rest / (part @ part))
    return Beyond(scale=1.0, dispatch_s=float(found[0]), timing_s=float(found[1]))


def fits_of(seen: list[Seen], paces: list[float], by: Calibrated) -> dict[str, Beyond]:
    fits = {}
    for phase in TOLD:
        apart = phase == "optimizer"
        told = []
        for each, slower in list(zip(seen, paces, strict=True))[:: 5 if apart else 1]:
            work = works_of(each.case)[phase] if apart else each.works[phase]
            together_s, _ = by.operators_s(work, resident(each.case, phase))
            told.append((together_s, work.dispatched, work.operators, each.took_s[phase] / slower))
        operators_s, dispatched, timed, took_s = (list(column) for column in zip(*told, strict=True))
        fits[phase] = (
            beyond(operators_s, dispatched, took_s) if apart else around(operators_s, dispatched, timed, took_s)
        )
    return fits


def calibrate(say: Callable[[str], None] = lambda line: None) -> tuple[Hardware, list[Findings]]:
    """Within three minutes of both threads' and caches' attention; and what disturbed them, if anything did."""
    device = torch.device("cpu")
    say("memory bandwidth")
    (rates, when_reading), (copied, when_copying) = reading(), copying()
    products = {name: most_flops(dtype) for name, dtype in DTYPES.items()}
    peaks = {name: peak for name, (peak, _) in products.items()}
    found = [when_reading, when_copying, *(each for _, each in products.values())]
    beside = reference()
    seen = []
    for n, shape in enumerate(SAMPLES):
        say(f"model {n + 1} of {len(SAMPLES)}")
        one, when = observed(shape, beside)
        seen.append(one)
        found.append(when)
    then_s = {phase: median(each.reference_s[phase] for each in seen) for phase in REFERRED}
    paces = [pace(each.reference_s, then_s) for each in seen]
    say("optimizer")
    points = points_of(seen, paces)
    updates, when_updating = time_operators(dict(optimizer_calls()))
    found.append(when_updating)
    for operator, took_s in updates.items():
        points[operator.kind].append([*operator.size, took_s / operator.work])
    alone = Calibrated(operators=points, reading=[list(rate) for rate in rates], beyond={})
    fits = fits_of(seen, paces, alone)
    say("messages between processes")
    reduced = all_reduce()
    say("memory that kernels keep")
    kept = {shape[6]: kernel_buffers(sample(shape)) for shape in BUFFERED}
    where = environment("calibrate", device)
    content: dict[str, object] = {
        "created": where.created,
        "identity": dict(where.identity),
        "references_s": then_s,
        "reading": rates,
        "copying_bytes_per_s": copied,
        "all_reduce": reduced,
        "kernel_buffers_bytes": kept,
        "operators": dict(points),
        "beyond": {phase: asdict(fit) for phase, fit in fits.items()},
    }
    content["id"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    threads = torch.get_num_threads()
    hardware = Hardware(
        name=f"{where.identity['cpu']}, {threads} thread{'s' * (threads > 1)}",
        peak_flops_per_s=peaks,
        bandwidth_bytes_per_s=rates[-1][1],
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        source=f"experiments/calibrate.py, {where.created}, torch {where.identity['torch']}",
        provenance="measured",
        calibration=content,
    )
    return hardware, found


def kernel_buffers(case: Case) -> dict[str, int]:
    """Bytes that libraries keep when every tensor is gone, by life."""
    lives = {"training": "training", "inference": "generation"}
    with ThreadPoolExecutor(len(lives)) as pool:  # how long it takes does not matter
        found = pool.map(partial(account, case), lives.values())
    return {
        life: 0 if isinstance(each, Failed) else max(0, each.kernels_bytes)
        for life, each in zip(lives, found, strict=True)
    }
