"""What does a KV cache hold, and what does it save, by the length of the text so far?

    python experiments/kv_cache.py
    python experiments/kv_cache.py checkpoint=runs/latest
    python experiments/kv_cache.py model=gpt2 measure.budget=20

At each context one more token is decoded twice, in turns: with the cache, and with the whole text sent through the
forward again.

:chapter: Serving
:unread: measure.energy optim.beta1 optim.beta2 optim.clip optim.lr optim.min_lr optim.momentum optim.muon_lr
optim.schedule optim.warmup_steps optim.weight_decay
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.results import Results, Row, RowFields, only, select
from isoforward.measure.benchmark import Measured, Part, part_by_part
from isoforward.measure.case import Case, batch_of, frozen_of, identity_row, master_of
from isoforward.measure.passes import Bench, derived
from isoforward.measure.train_and_serve import Serving, context_flop_rows
from isoforward.model import footprint

LARGE = 8  # exponents are those of the longest contexts, from an eighth of the longest on


def contexts(case: Case) -> list[int]:
    found = [min(case.model.context, case.measure.context)]
    while found[-1] >= 4:
        found.append(found[-1] // 2)
    return found[::-1]


def bench(case: Case) -> Bench:
    master = master_of(case)
    frozen = frozen_of(case, master)
    tokens, _ = batch_of(case)
    identity = identity_row(case, master, frozen, tokens[:1])
    serving = Serving(case, frozen, tokens)
    works = {
        kept: [make(n) for n in contexts(case)] for kept, make in ((True, serving.cached), (False, serving.uncached))
    }

    def rows(measured: Measured) -> Iterator[Row]:
        yield identity
        for n in contexts(case):
            yield from context_flop_rows(case, n, "model")
            held = footprint.kv_bytes(case.model, length=n, dtype=case.precision)
            about: RowFields = {"life": "inference", "phase": "decode", "quantity": "memory", "per": "sequence"}
            at = case.at_context(n, cache=True, category="KV cache")
            yield case.row(about, value=float(held), provenance="counted", conditions=at)
        for cache, each in works.items():
            part = Part(life="inference", phase="decode", per="token", conditions=case.conditions(cache=cache))
            samples = {n: measured.estimate(*work.parts).samples for n, work in zip(contexts(case), each, strict=True)}
            yield derived(case, part, slopes(samples), quantity="exponent")

    return Bench(works=[*works[True], *works[False]], pairs=part_by_part(works[True], works[False]), rows=rows)


def slopes(samples: Mapping[int, Sequence[float]]) -> list[float]:
    """Of log time over log context, over the longest contexts: the least-squares slope of each round."""
    longest = max(samples)
    at = {context: times for context, times in samples.items() if context * LARGE >= longest}
    x = [math.log(context) for context in at]
    mean = sum(x) / len(x)
    weight = sum((a - mean) ** 2 for a in x)
    rounds = zip(*at.values(), strict=False)  # a context that was known early has fewer
    return [sum((a - mean) * math.log(time) for a, time in zip(x, times, strict=True)) / weight for times in rounds]


def answer(results: Results) -> str:
    times = select(results, quantity="time")
    lengths = sorted({int(one.setting("context")) for one in times})
    pairs = {n: [only(times, context=n, cache=kept) for kept in (True, False)] for n in lengths}
    ratios = {n: results.judge(one, other).ratio for n, (one, other) in pairs.items()}
    pays = [n for n in lengths if all(ratios[m].high < 1 for m in lengths if m >= n)]
    longest = lengths[-1]
    held = only(results, quantity="memory", context=longest).number
    kept, again = (only(results, quantity="flops", context=longest, cache=cache).number for cache in (True, False))
    grows = [only(results, quantity="exponent", cache=cache) for cache in (True, False)]
    shown = [f"{each.value:.2f} ({each.low:.2f} to {each.high:.2f})" for each in grows]
    return (
        (f"A KV cache pays from a context of {pays[0]} on. " if pays else "No context is long enough to pay. ")
        + f"At {longest} it holds {units.size(held)} and saves {units.count(again - kept)}FLOP a token "
        f"({1 - kept / again:.1%} of them): {units.times(1 / ratios[longest].value)} as fast. "
        f"Time grows with the context to the power of {shown[0]} with it, {shown[1]} without."
    )


def main(config: ExperimentConfig) -> None:
    ask(config, "kv_cache", bench, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
