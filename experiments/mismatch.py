"""Same forward, same numbers? How far is what serving says of a token from what training says of it?

    python experiments/mismatch.py checkpoint=runs/latest
    python experiments/mismatch.py checkpoint=runs/latest endpoint=http://127.0.0.1:8000/v1
    python experiments/mismatch.py model=gpt2

Every way of serving samples texts and gives each token's log-probability; training's forward reads the same texts with
the same weights, and a forward in fp64 says which of the two is nearer. Then one kernel at a time shows who makes the
difference, and one sequence is decoded in other company. Of a large model fewer texts are compared, unless sequences=
says how many; batches are as large all the same. The price of exact=true is timed beside usual decoding. endpoint= is
any server that speaks OpenAI's completions and has the export open.

:chapter: Trust
:unread: measure.context measure.energy optim.beta1 optim.beta2 optim.clip optim.lr optim.min_lr optim.momentum
optim.muon_lr optim.name optim.schedule optim.warmup_steps optim.weight_decay
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from isoforward.app.command_line import run
from isoforward.app.question import Asking, at_most, case_of
from isoforward.app.run_directory import claim
from isoforward.app.telling import tell
from isoforward.base import units
from isoforward.base.checks import at_least
from isoforward.base.config import ExperimentConfig, MeasureConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, only, select
from isoforward.base.terminal import say
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import freeze
from isoforward.formats.loading import load_tokenizer
from isoforward.measure.benchmark import Part, Work, timed
from isoforward.measure.case import Case, frozen_of, identity_row, master_of
from isoforward.measure.company import company_rows
from isoforward.measure.culprits import REST, culprits, ladder
from isoforward.measure.mismatch import (
    Likeliest,
    Served,
    agreed,
    cache_for,
    exactly,
    in_double,
    missing_row,
    row,
    rows_of,
    serve,
)
from isoforward.measure.passes import Bench, call_apart
from isoforward.measure.ways import BATCHES, EXACT, FEW, PROMPTS, exact_ways, usual_ways, way_rows
from isoforward.model.cost import forward_flops
from isoforward.model.gpt import GPT
from isoforward.model.steps import decode, prefill
from isoforward.serve.decoding import forward_passes
from isoforward.serve.endpoint import Endpoint
from isoforward.serve.exact import fewest_rows

MOST = 64  # sequences that are compared in each way
FLOPS = 1e12  # that training's forward of them may take: some ten seconds on two cores
FORCED = 32  # tokens of the texts that are decoded kernel by kernel, and in company
ANOTHER = 0.5  # nat, on average: no rounding moves a log-probability so far, another model does
HOW = {True: "exact", False: "usual"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatch(ExperimentConfig):
    sequences: int | None = None  # compared in each way; null: 64, or fewer of a large model
    endpoint: str | None = None  # http://127.0.0.1:8000/v1, say

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("sequences", self.sequences, 1)
        if self.compile:
            raise BadInput("compile=true: compiled decode is one of the ways that are compared; leave this key out")
        if self.endpoint is not None and self.checkpoint is None:
            raise BadInput("endpoint= serves the weights of an export; name it, checkpoint=runs/latest")

    def compared(self, model: ModelConfig) -> int:
        one = forward_flops(model, batch=1, length=model.context).total
        return self.sequences or max(1, min(MOST, int(FLOPS / one)))


# What needs no clock, and so no repetition


def comparisons(case: Case, sequences: int) -> list[Row]:
    master = master_of(case)
    frozen = frozen_of(case, master)
    double = in_double(frozen)
    texts = texts_of(case, frozen, max(sequences, PROMPTS))
    prompts, forced = [text[: case.prompt] for text in texts], [text[:FORCED] for text in texts[:PROMPTS]]
    found = [identity_row(case, master, frozen, torch.tensor(prompts[:1]))]
    master.eval()  # a forward with dropout is no policy
    try:
        rows = fewest_rows(case.model, master.dtype)
    except BadInput as refusal:
        rows = 0
        found.append(missing_row(case, "difference", refusal, {"way": EXACT}, statistic="largest"))
    usual = usual_ways(case, master, frozen, prompts, sequences)
    exact = exact_ways(master, frozen, rows, prompts, sequences) if rows else ()
    found += way_rows(case, chain(usual, exact), sequences, master, double)
    found += company_rows(case, frozen, torch.tensor(forced), exact=False, way=HOW[False])
    if rows:
        found += company_rows(case, exactly(master, rows), torch.tensor(forced), exact=True, way=HOW[True])
        moved = ladder(master, rows, case.kernels, forced[: min(FEW, sequences)])
        found += [row(case, "moved by a kernel", share, {"kernel": kernel}) for kernel, share in moved.items()]
    return found


def texts_of(case: Case, model: GPT, count: int) -> list[list[int]]:
    """What the model itself writes after one token drawn at random: text as it will be served."""
    generator = torch.Generator().manual_seed(case.seed)
    first = torch.randint(case.model.vocabulary, (count, 1), generator=generator).tolist()
    length = min(max(case.prompt, FORCED), case.model.context)
    return serve(forward_passes, model, first, batch=PROMPTS, seed=case.seed, new_tokens=length - 1).texts


# The price of exactness


def bench(case: Case) -> Bench:
    """Prefill, and decode after it, of one sequence and of 16, exactly and as usual; nothing where exact is refused."""
    master = master_of(case)
    try:
        exact = exactly(master, fewest_rows(case.model, master.dtype))
    except BadInput:
        return Bench(works=[])
    models = {True: exact, False: frozen_of(case, master)}
    generator = torch.Generator().manual_seed(case.seed)
    pairs: list[tuple[Work, Work]] = []
    for batch in (1, 16):
        tokens = torch.randint(case.model.vocabulary, (batch, case.prompt + 1), generator=generator)
        ways = [list(works_of(case, models[is_exact], tokens, exact=is_exact)) for is_exact in (True, False)]
        pairs += zip(*ways, strict=True)
    return Bench(
        works=[work for pair in pairs for work in pair], pairs=[(one.part, other.part) for one, other in pairs]
    )


def works_of(case: Case, model: GPT, tokens: Tensor, *, exact: bool) -> Iterator[Work]:
    """Of tokens (B, T + 1): the prefill of all but the last, and the decode of that one."""
    cache, prompt, one = cache_for(model, tokens, exact=exact), tokens[:, :-1], tokens[:, -1:].contiguous()

    def read() -> None:
        cache.rewind(0)
        prefill(model, prompt, cache)

    def more() -> None:
        cache.rewind(prompt.shape[1])
        decode(model, one, cache)

    read()
    conditions = case.conditions(way=HOW[exact], batch=len(tokens), prompt=case.prompt)
    steps: Mapping[str, Callable[[], None]] = {"prefill": read, "decode": more}
    for phase, step in steps.items():
        yield timed(case.clock, Part(life="inference", phase=phase, per="step", conditions=conditions), step)


# A server


def reached(url: str, tokenizer: Tokenizer) -> Endpoint:
    """Before anything is measured; BadInput where no answer comes that could be compared."""
    engine = Endpoint(url, tokenizer)
    engine.probe()
    return engine


def endpoint_rows(case: Case, engine: Endpoint, count: int, console: Console) -> Iterator[Row]:
    """What the server samples after each prompt, and its greedy text; BadInput where it is none of these weights."""
    master = master_of(case).eval()
    frozen = freeze(master)
    prompts = [text[: case.prompt] for text in texts_of(case, frozen, count)]
    about = {"way": "endpoint", "peer": engine.model}
    served, greedy = Served(), Served()
    stopped: BadInput | None = None
    try:
        for number, prompt in enumerate(prompts):
            told = engine.complete(prompt, new_tokens=case.new_tokens, temperature=1.0, seed=case.seed + number)
            if told.tokens:
                served.add(*told)
            if number < FEW:
                told = engine.complete(prompt, new_tokens=case.new_tokens, temperature=0.0, seed=case.seed)
                if told.tokens:
                    greedy.add(*told)
    except BadInput as refusal:
        if not served.texts:
            raise
        stopped = refusal
    if not served.texts:
        raise BadInput(f"endpoint={engine.url} gives no token after any of {count} prompts")
    rows = list(rows_of(case, about, served, master, in_double(frozen)))
    mean = next(r.number for r in rows if r.quantity == "difference" and r.conditions.get("statistic") == "mean")
    if mean > ANOTHER:
        raise BadInput(
            f"endpoint={engine.url} serves another model than {case.export}: its tokens' log-probabilities are "
            f"{mean:.2g} nat from training's on average"
        )
    yield from rows
    if greedy.texts:
        yield row(case, "agreed", agreed(greedy, Likeliest(master)), about)
    if stopped is not None:
        say(console, f"it stopped after {len(served.texts)} of {count} sequences, which are kept")
        raise stopped


# What is said


def answer(results: Results) -> str:
    asked = select(results, quantity="difference", statistic="largest")
    exact = [r for r in asked if str(r.conditions["way"]).startswith(EXACT) and r.value is not None]
    usual = [r for r in asked if r not in exact and r.value is not None]
    first, furthest = usual[0], max(usual, key=lambda r: r.number)
    share = only(results, quantity="equal", **same_way(first)).value
    low, high = (
        only(results, quantity="importance ratio", statistic=end, **same_way(furthest)).value
        for end in ("smallest", "largest")
    )
    told = [
        f"Rounded to fp32, {share:.0%} of the log-probabilities of {named(first)} are training's; before rounding the "
        f"largest difference is {first.value:.1e} nat. Furthest is {named(furthest)}: {furthest.value:.1e}, importance "
        f"ratios {units.near_one(low or 0.0)} to {units.near_one(high or 0.0)}"
    ]
    told += [f"the server's largest difference is {r.value:.1e} nat" for r in usual if "peer" in r.conditions]
    if exact:
        worst = max(r.number for r in exact)
        told.append(f"under exact=true it is {worst:.1e}" if worst else "under exact=true all have training's bits")
    told += [f"{named(r)} is left out: {r.reason}" for r in asked if r.value is None]
    moved_by = {str(r.conditions["kernel"]): r.number for r in select(results, quantity="moved by a kernel")}
    if found := culprits(moved_by):
        parts = ", ".join(f"{kernel} {moved_by[kernel]:.1e}" for kernel in found)
        told.append(f"alone, each of usual decoding's kernels moves a log-probability by, on average: {parts}")
    if moved_by.get(REST) == 0:
        told.append("norms, activations and casts move none")
    if company := select(results, quantity="moved by company", way=HOW[False]):
        moved = ", ".join(str(r.conditions["change"]) for r in company if r.value)
        told.append(f"a sequence's own logits change with {moved or 'nothing else in the batch'}")
    for phase in ("prefill", "decode"):
        prices = []
        for batch in (1, 16):
            pair = [select(results, quantity="time", phase=phase, batch=batch, way=HOW[way]) for way in (True, False)]
            if all(pair):
                prices.append(f"{results.judge(pair[0][0], pair[1][0]).sentence()} (batch {batch})")
        if prices:
            told.append(f"time of {phase} under exact=true, as a multiple of the usual: {', '.join(prices)}")
    return f"{'. '.join(sentence[0].upper() + sentence[1:] for sentence in told)}."


def named(row: Row) -> str:
    told = row.conditions.get("peer", row.conditions["way"])
    return f"{told} at batch {row.conditions['batch']}" if "batch" in row.conditions else str(told)


def same_way(row: Row) -> dict[str, Any]:
    return {key: row.conditions[key] for key in ("way", "batch", "peer") if key in row.conditions}


def refuse_cut(config: Mismatch, case: Case) -> None:
    """Lengths that were asked for; those of the defaults are cut to the context."""
    asked, usual = config.measure, MeasureConfig()
    together = asked.prompt + asked.new_tokens
    if (asked.prompt, asked.new_tokens) != (usual.prompt, usual.new_tokens) and together > case.model.context:
        raise BadInput(
            f"measure.prompt + measure.new_tokens = {together} is longer than the model's context of "
            f"{case.model.context}; write less"
        )


def main(config: Mismatch) -> None:
    case = case_of(config, "mismatch", rows=BATCHES)
    if case.device != "cpu":
        raise BadInput(f"mismatch compares bits of kernels on a CPU, and here is {case.device}: hide it")
    refuse_cut(config, case)
    engine = None
    if config.endpoint is not None:
        engine = reached(config.endpoint, load_tokenizer(Path(str(case.export))))
    with claim(config) as run_dir:
        question = Asking(run_dir)
        question.say(f"measuring mismatch{at_most(config.measure)}")
        question.measure(case, bench)
        sequences = config.compared(case.model)
        question.say(f"comparing {sequences} x {case.new_tokens} tokens of each way of serving")
        question.add(call_apart(comparisons, case, sequences, threads=case.threads, what="mismatch"))
        refusal = None
        if engine is not None:
            question.say(f"asking {units.several(sequences, 'text')} of {config.endpoint}")
            try:
                for each in endpoint_rows(case, engine, sequences, question.console):
                    question.add([each])
            except BadInput as error:
                refusal = error
        tell(config, run_dir, question.console, answer)
        if refusal is not None:
            raise refusal


if __name__ == "__main__":
    sys.exit(run(main, Mismatch))
