"""What does a KV cache hold, and what does it save, by the length of the text so far?

    python experiments/kv_cache.py
    python experiments/kv_cache.py checkpoint=runs/latest
    python experiments/kv_cache.py model=gpt2 measure.repeats=5

At each context one more token is decoded twice, in turns: with the cache, and with the whole text sent through the
forward again.

:chapter: Serving
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.estimates import ratio, summarise
from isoforward.base.results import Results, Row
from isoforward.formats.export import freeze
from isoforward.measure import flops as counting
from isoforward.measure.case import Case, Laps, batch_of, identity_row, master_of, record, row, spent, timed
from isoforward.measure.train_and_serve import at_context
from isoforward.model import footprint, steps
from isoforward.model.gpt import GPT, KVCache
from isoforward.show.compare import only, select

BURST = 4  # decode steps in one sample: one alone is shorter than the clock's trust
LARGE = 8  # exponents are those of the longest contexts, from an eighth of the longest on


def contexts(case: Case) -> list[int]:
    found = [case.model.context]
    while found[-1] >= 4:
        found.append(found[-1] // 2)
    return found[::-1]


def candidates(case: Case, frozen: GPT) -> dict[str, Callable[[], dict[str, float]]]:
    tokens = batch_of(case)[0].flatten()
    text = tokens.repeat(-(-case.model.context // len(tokens)))[None]  # (1, at least context)
    cache = KVCache(case.model, batch=1, capacity=case.model.context, dtype=frozen.dtype, device=case.device)
    cache.fill(0)

    def cached(context: int) -> dict[str, float]:
        def burst() -> None:
            for _ in range(BURST):
                cache.length = context - 1
                steps.decode(frozen, text[:, :1], cache)

        return {"token": spent(case, burst) / BURST}

    def uncached(context: int) -> dict[str, float]:
        return {"token": spent(case, partial(steps.decode_uncached, frozen, text[:, :context]))}

    found = {f"{context} True": partial(cached, context) for context in contexts(case)}
    return found | {f"{context} False": partial(uncached, context) for context in contexts(case)}


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    master = master_of(case)
    frozen = freeze(master)
    identity = identity_row(case, master, frozen, batch_of(case)[0][:1])

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        yield identity
        decode = {"life": "inference", "phase": "decode", "per": "token"}
        for cache in (True, False):
            samples = {context: [lap["token"] for lap in laps[f"{context} {cache}"]] for context in contexts(case)}
            for context, times in samples.items():
                at = at_context(case, context, cache) | {"executions": BURST if cache else 1}
                yield row(case, **decode, **timed(times), conditions=at)
                yield row(case, **decode, **flops(case, context, cache), conditions=at)
            yield row(case, **decode, **exponent(samples), conditions=case.conditions(cache=cache))
        for context in contexts(case):
            held = footprint.kv_bytes(case.model, length=context, dtype=case.precision)
            memory = {"life": "inference", "phase": "decode", "quantity": "memory", "unit": "byte", "per": "sequence"}
            at = at_context(case, context, True) | {"category": "KV cache"}
            yield row(case, **memory, value=float(held), provenance="counted", conditions=at)

    return record(packed, candidates(case, frozen), tell)


def flops(case: Case, context: int, cache: bool) -> dict:
    if cache:
        count = counting.count_decode(case.model, batch=1, cached=context - 1)
    else:
        count = counting.count_decode_uncached(case.model, batch=1, length=context)
    about = {"quantity": "flops", "unit": "flop", "provenance": "counted", "convention": "model"}
    return {**about, "value": float(count)}


def exponent(samples: dict[int, list[float]]) -> dict:
    """Of time ~ context^n over the longest contexts: the least-squares slope of each round, and their median."""
    longest = max(samples)
    at = {context: times for context, times in samples.items() if context * LARGE >= longest}
    x = [math.log(context) for context in at]
    mean = sum(x) / len(x)
    weight = sum((a - mean) ** 2 for a in x)
    slopes = [
        sum((a - mean) * math.log(time) for a, time in zip(x, times, strict=True)) / weight
        for times in zip(*at.values(), strict=True)
    ]
    found = summarise(slopes)
    about = {"quantity": "exponent", "unit": "of context", "samples": tuple(slopes)}
    return {**about, "value": found.median, "low": found.low, "high": found.high}


def answer(results: Results) -> str:
    times = select(results, quantity="time")
    lengths = sorted({int(one.conditions["context"]) for one in times})
    pairs = {n: [only(tuple(times), context=n, cache=kept) for kept in (True, False)] for n in lengths}
    ratios = {n: ratio(one.samples, other.samples) for n, (one, other) in pairs.items()}
    pays = [n for n in lengths if all(ratios[m].high < 1 for m in lengths if m >= n)]
    longest = lengths[-1]
    held = only(results, quantity="memory", context=longest).value
    kept, again = (only(results, quantity="flops", context=longest, cache=cache).value for cache in (True, False))
    grows = [only(results, quantity="exponent", cache=cache) for cache in (True, False)]
    shown = [f"{each.value:.2f} ({each.low:.2f} to {each.high:.2f})" for each in grows]
    return (
        (f"A KV cache pays from a context of {pays[0]} on. " if pays else "No context is long enough to pay. ")
        + f"At {longest} it holds {units.size(held)} and saves {units.count(again - kept)}FLOP a token "
        f"({1 - kept / again:.1%} of them): {units.times(1 / ratios[longest].value)} as fast. "
        f"Time grows with the context to the power of {shown[0]} with it, {shown[1]} without."
    )


def main(config: ExperimentConfig) -> None:
    ask(config, "kv_cache", "kv_cache:measure", answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
