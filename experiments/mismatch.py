"""Same forward, same numbers? How far is what serving says of a token from what training says of it?

    python experiments/mismatch.py checkpoint=runs/latest
    python experiments/mismatch.py checkpoint=runs/latest endpoint=http://127.0.0.1:8000/v1
    python experiments/mismatch.py model=gpt2 sequences=4 measure.new_tokens=16 precision=bf16

Every way of serving samples texts and gives each token's log-probability; training's forward reads the same texts with
the same weights, and a forward in fp64 says which of the two is nearer. Then one kernel at a time shows who makes the
difference, and one sequence is decoded in other company. The price of exact=true is timed
beside usual decoding. endpoint= is any server that speaks OpenAI's completions and has the export open; compile=true
adds our compiled decoding.

:chapter: Trust
:unread: measure.context measure.energy optim.beta1 optim.beta2 optim.clip optim.lr optim.min_lr optim.momentum
optim.muon_lr optim.name optim.schedule optim.warmup_steps optim.weight_decay
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from isoforward.app.command_line import run
from isoforward.app.question import at_most, case_of
from isoforward.app.run_directory import claim
from isoforward.app.telling import command_line, tell
from isoforward.base import units
from isoforward.base.checks import at_least
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, only, select, write
from isoforward.base.terminal import say
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.formats.loading import load_tokenizer
from isoforward.measure.benchmark import Part, Work, timed
from isoforward.measure.case import Case, frozen_of, identity_row, master_of
from isoforward.measure.culprits import (
    REST,
    culprits,
    differing,
    exact_cache,
    shares,
    shares_of_the_rest,
    usual_cache,
    usual_kernels,
)
from isoforward.measure.mismatch import Passes, Served, agreed, in_double, row, rows_of, serve
from isoforward.measure.passes import Bench, measure_apart
from isoforward.model.gpt import GPT
from isoforward.model.steps import decode, prefill
from isoforward.serve.decoding import forward_passes
from isoforward.serve.endpoint import Endpoint
from isoforward.serve.exact import use_exact
from isoforward.serve.quantised import quantise
from isoforward.serve.speculative import speculative_passes
from isoforward.serve.transformers_model import load_wrapped

BATCHES = (1, 4, 16, 64)
FEW = 4  # sequences of the ways that are slow, and of the ladder
COMPANY = 64  # sequences that one is decoded with
FORCED = 32  # tokens of the ladder's texts
ANOTHER = 0.5  # nat, on average: no rounding moves a log-probability so far, another model does
EXACT, USUAL = "exact", "usual"
KEY_OF_EXACT = "cached decode, exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatch(ExperimentConfig):
    sequences: int = 64  # sampled in each way
    endpoint: str | None = None  # http://127.0.0.1:8000/v1, say

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("sequences", self.sequences, 1)
        if self.endpoint is not None and self.checkpoint is None:
            raise BadInput("endpoint= serves the weights of an export; name it, checkpoint=runs/latest")


# Ways of serving


def prompts_of(case: Case, model: GPT, count: int) -> list[list[int]]:
    """What the model itself writes after one token drawn at random: text as it will be served."""
    generator = torch.Generator().manual_seed(case.seed)
    first = torch.randint(case.model.vocabulary, (count, 1), generator=generator).tolist()
    length = case.prompt - 1
    return (
        serve(forward_passes, model, first, batch=count, seed=case.seed, new_tokens=length).texts if length else first
    )


def unlike(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of every length from 1 on."""
    return [list(prompt[: 1 + i % len(prompt)]) for i, prompt in enumerate(prompts)]


Way = tuple[dict[str, Any], Passes, GPT, int, Sequence[Sequence[int]]]  # conditions, passes, model, batch, prompts


def ways(case: Case, master: GPT, prompts: list[list[int]], compiles: bool) -> Iterator[Way]:
    frozen = frozen_of(case, master)
    for batch in BATCHES:
        if batch <= len(prompts):
            yield {"way": "cached decode", "batch": batch}, forward_passes, frozen, batch, prompts
    some = prompts[:FEW]
    yield {"way": "left-padded batch", "batch": len(prompts)}, forward_passes, frozen, len(prompts), unlike(prompts)
    yield {"way": "uncached", "batch": 1}, partial(forward_passes, cache=False), frozen, 1, some
    drafted = partial(speculative_passes, draft=frozen, draft_tokens=4)
    yield {"way": "with a draft", "batch": 1}, drafted, frozen, 1, some
    if compiles:
        compiled = partial(forward_passes, compile=True)
        yield {"way": "compiled", "batch": len(some)}, compiled, freeze(master), len(some), some
    if case.precision == "fp32":
        low = freeze(master, dtype=torch.bfloat16)
        yield {"way": "cached decode in bf16", "batch": len(prompts)}, forward_passes, low, len(prompts), prompts
        rounded = quantise(freeze(master))
        yield {"way": "cached decode in int8", "batch": len(prompts)}, forward_passes, rounded, len(prompts), prompts


def exact_ways(master: GPT, prompts: list[list[int]]) -> Iterator[Way]:
    model = freeze(master)
    rows = use_exact(model)
    passes = partial(forward_passes, exact=rows)
    for batch in BATCHES:
        if batch <= len(prompts):
            yield {"way": KEY_OF_EXACT, "batch": batch}, passes, model, batch, prompts
    how = {"way": f"{KEY_OF_EXACT}, left-padded", "batch": len(prompts)}
    yield how, passes, model, len(prompts), unlike(prompts)
    drafted = partial(speculative_passes, draft=freeze(master), draft_tokens=4, exact=rows)
    yield {"way": f"{KEY_OF_EXACT}, with a draft", "batch": 1}, drafted, model, 1, prompts[:FEW]


def by_transformers(case: Case, master: GPT, prompts: list[list[int]]) -> Served:
    """Its `generate`, sampling at a temperature of 1, on our export."""
    with tempfile.TemporaryDirectory() as directory:
        place = export(freeze(master), Path(directory) / "export", tokenizer=None)
        model = load_wrapped(place, dtype=master.dtype).model.eval()
    torch.manual_seed(case.seed)
    tokens = torch.tensor(prompts)
    asked = {"do_sample": True, "top_k": 0, "max_new_tokens": case.new_tokens, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        told = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), output_logits=True, return_dict_in_generate=True, **asked
        )
    served = Served()
    for prompt, text, logits in zip(prompts, told.sequences, torch.stack(told.logits, dim=1), strict=True):
        served.add_logits(prompt, text[len(prompt) :].tolist(), logits)
    return served


# Rows


def bench(case: Case, count: int) -> Bench:
    compiles, case = case.compile, dataclasses.replace(case, compile=False)
    master = master_of(case)
    frozen = frozen_of(case, master)
    prompts = prompts_of(case, frozen, count)
    works = price(case, master, frozen)
    pairs = [(exact.parts[0], usual.parts[0]) for exact, usual in zip(works[EXACT], works[USUAL], strict=True)]

    def rows(measured: object) -> Iterator[Row]:
        yield identity_row(case, master, frozen, torch.tensor(prompts[:1]))
        yield from served_rows(case, master, frozen, prompts, compiles)
        yield from ladder_rows(case, master, prompts)
        yield from company_rows(case, master, prompts)

    return Bench(works=[work for each in works.values() for work in each], pairs=pairs, rows=rows)


def served_rows(case: Case, master: GPT, frozen: GPT, prompts: list[list[int]], compiles: bool) -> Iterator[Row]:
    exact = in_double(frozen)
    try:
        also = list(exact_ways(master, prompts))
    except BadInput as refusal:
        also = []
        about: dict[str, Any] = {"life": "inference", "phase": "decode", "quantity": "difference", "per": "token"}
        at = case.conditions(way=KEY_OF_EXACT)
        yield case.row(**about, value=None, provenance="unavailable", reason=str(refusal), conditions=at)
    for about, passes, model, batch, own in [*ways(case, master, prompts, compiles), *also]:
        asked = {"batch": batch, "seed": case.seed, "new_tokens": case.new_tokens}
        yield from rows_of(case, about, serve(passes, model, own, **asked), master, exact)
        greedy = serve(passes, model, own[:FEW], temperature=0, **asked)
        yield row(case, "agreed", agreed(master, greedy), about)
    if find_spec("transformers") is not None:
        some = prompts[:16]
        about = {"way": "Transformers' generate", "batch": len(some)}
        yield from rows_of(case, about, by_transformers(case, master, some), master, exact)


def ladder_rows(case: Case, master: GPT, prompts: list[list[int]]) -> Iterator[Row]:
    """Each of serving's kernels alone in exact decoding; none where that is not to be had, which its row says."""
    texts = forced_texts(case, freeze(master), prompts[:FEW])
    try:
        found = shares(master, usual_kernels(case.kernels), texts) | shares_of_the_rest(master, texts)
    except BadInput:
        return
    for kernel, share in found.items():
        yield row(case, "moved by a kernel", share, {"kernel": kernel})


def forced_texts(case: Case, model: GPT, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    length = min(FORCED, case.model.context)
    first = [prompt[:1] for prompt in prompts]
    return serve(forward_passes, model, first, batch=len(first), seed=case.seed, new_tokens=length - 1).texts


def company_rows(case: Case, master: GPT, prompts: list[list[int]]) -> Iterator[Row]:
    """What one sequence's logits depend on, decoded as usual and exactly."""
    texts = torch.tensor(forced_texts(case, freeze(master), (prompts * COMPANY)[:COMPANY]))[:, :FORCED]
    for how, cache_of in ((USUAL, usual_cache), (EXACT, exact_cache)):
        model = frozen_of(case, master) if how == USUAL else freeze(master)
        try:
            if how == EXACT:
                use_exact(model)
        except BadInput:
            return
        for change, count in differing(model, texts, cache_of):
            logits = (texts.shape[1] - 1) * case.model.vocabulary
            yield row(case, "moved by company", float(count), {"way": how}, change=change, logits=logits)


def price(case: Case, master: GPT, frozen: GPT) -> dict[str, list[Work]]:
    """Prefill, and decode after it, of one sequence and of 16, as usual and exactly."""
    works: dict[str, list[Work]] = {USUAL: [], EXACT: []}
    exact = freeze(master)
    try:
        use_exact(exact)
    except BadInput:
        return works
    generator = torch.Generator().manual_seed(case.seed)
    for batch in (1, 16):
        tokens = torch.randint(case.model.vocabulary, (batch, case.prompt + 1), generator=generator)
        for how, model, cache_of in ((USUAL, frozen, usual_cache), (EXACT, exact, exact_cache)):
            works[how] += [
                timed(case.clock, part_of(case, phase, how, batch), step)
                for phase, step in steps_of(model, tokens, cache_of).items()
            ]
    return works


def part_of(case: Case, phase: str, how: str, batch: int) -> Part:
    conditions = case.conditions(way=how, batch=batch, prompt=case.prompt)
    return Part(life="inference", phase=phase, per="step", conditions=conditions)


def steps_of(model: GPT, tokens: Tensor, cache_of: Callable[..., Any]) -> dict[str, Callable[[], object]]:
    cache, prompt, one = cache_of(model, tokens), tokens[:, :-1], tokens[:, -1:].contiguous()

    def read() -> None:
        cache.rewind(0)
        prefill(model, prompt, cache)

    def more() -> None:
        cache.rewind(prompt.shape[1])
        decode(model, one, cache)

    read()
    return {"prefill": read, "decode": more}


# A server


def endpoint_rows(case: Case, url: str, tokenizer: Tokenizer, count: int, console: Console) -> Iterator[Row]:
    """What the server samples after each prompt, and its greedy text; BadInput where it is none of these weights."""
    engine = Endpoint(url, tokenizer)
    master = master_of(case)
    frozen = freeze(master)
    prompts = prompts_of(case, frozen, count)
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
        raise BadInput(f"endpoint={url} gives no token after any of {count} prompts")
    rows = list(rows_of(case, about, served, master, in_double(frozen)))
    mean = next(r.value for r in rows if r.quantity == "difference" and r.conditions.get("statistic") == "mean")
    if mean is not None and mean > ANOTHER:
        raise BadInput(
            f"endpoint={url} serves another model than {case.export}: its tokens' log-probabilities are {mean:.2g} nat "
            "from training's on average"
        )
    yield from rows
    if greedy.texts:
        yield row(case, "agreed", agreed(master, greedy), about)
    if stopped is not None:
        say(console, f"it stopped after {len(served.texts)} of {count} sequences, which are kept")
        raise stopped


# What is said


def named(conditions: Any) -> str:
    told = conditions["peer"] if "peer" in conditions else conditions["way"]
    return f"{told} at batch {conditions['batch']}" if "batch" in conditions else str(told)


def answer(results: Results) -> str:
    largest = [r for r in select(results, quantity="difference", statistic="largest") if r.value is not None]
    exact = [r for r in largest if str(r.conditions["way"]).startswith(KEY_OF_EXACT)]
    plain = [r for r in largest if r not in exact]
    furthest = max(plain, key=lambda r: r.value or 0)
    at = furthest.conditions
    ratios = [only(results, quantity="importance ratio", statistic=s, **same_way(at)).value for s in ENDS]
    first = plain[0]
    share = only(results, quantity="equal", **same_way(first.conditions)).value
    told = [
        f"Of {named(first.conditions)}, {share:.0%} of the log-probabilities are training's, in fp32; the largest "
        f"difference is {first.value:.1e} nat. Furthest is {named(at)}: {furthest.value:.1e}, importance ratios "
        f"{ratios[0]:.4f} to {ratios[1]:.4f}"
    ]
    engines = [r for r in plain if "peer" in r.conditions]
    told += [f"the server's largest difference is {r.value:.1e} nat" for r in engines]
    if exact:
        worst = max(r.value or 0 for r in exact)
        told.append("exact=true gives training's bits everywhere" if worst == 0 else f"exact=true is {worst:.1e} off")
    elif refused := select(results, quantity="difference", way=KEY_OF_EXACT):
        told.append(str(refused[0].reason))
    shared = select(results, quantity="moved by a kernel")
    moved_by = {str(r.conditions["kernel"]): r.number for r in shared}
    if found := culprits(moved_by):
        parts = ", ".join(f"{kernel} {moved_by[kernel]:.1e}" for kernel in found)
        told.append(f"alone, each of usual decoding's kernels moves a log-probability by, on average: {parts}")
    if shared and not moved_by.get(REST):
        told.append("norms, activations and casts move none")
    company = select(results, quantity="moved by company", way=USUAL)
    if moved := [str(r.conditions["change"]) for r in company if r.value]:
        told.append(f"a sequence's own logits change with {', '.join(moved)}")
    elif company:
        told.append("a sequence's own logits change with nothing else in the batch")
    for phase in ("prefill", "decode"):
        prices = []
        for batch in (1, 16):
            pair = [select(results, quantity="time", phase=phase, batch=batch, way=way) for way in (EXACT, USUAL)]
            if all(pair):
                prices.append(f"{results.judge(pair[0][0], pair[1][0]).sentence()} (batch {batch})")
        if prices:
            told.append(f"time of {phase} under exact=true, as a multiple of the usual: {', '.join(prices)}")
    return f"{'. '.join(sentence[0].upper() + sentence[1:] for sentence in told)}."


ENDS = ("smallest", "largest")


def same_way(conditions: Any) -> dict[str, Any]:
    return {key: conditions[key] for key in ("way", "batch", "peer") if key in conditions}


def main(config: Mismatch) -> None:
    case = case_of(config, "mismatch", rows=BATCHES)
    if case.device != "cpu":
        raise BadInput(f"mismatch compares bits of kernels on a CPU, and here is {case.device}: hide it")
    tokenizer = None if config.endpoint is None else load_tokenizer(Path(str(case.export)))
    console = Console()
    with claim(config) as run_dir:
        say(console, f"measuring mismatch{at_most(config.measure)}")
        results = run_dir / "results.jsonl"
        where = measure_apart(case, bench, config.sequences, results=results, command=command_line())
        refusal = None
        if config.endpoint is not None and tokenizer is not None:
            say(console, f"asking {units.count(config.sequences)} texts of {config.endpoint}")
            try:
                for each in endpoint_rows(case, config.endpoint, tokenizer, config.sequences, console):
                    write(results, [dataclasses.replace(each, environment=where)])
            except BadInput as error:
                refusal = error
        tell(config, run_dir, console, answer)
        if refusal is not None:
            raise refusal


if __name__ == "__main__":
    sys.exit(run(main, Mismatch))
