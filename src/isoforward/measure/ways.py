"""The ways in which one model is served: ours, each by what its kernels are given, and Transformers' `generate`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from isoforward.base.device import device_of
from isoforward.base.errors import BadInput
from isoforward.base.results import Row
from isoforward.base.vocabulary import Condition
from isoforward.formats.export import export, freeze
from isoforward.measure.case import Case
from isoforward.measure.mismatch import Likeliest, Passes, Served, agreed, exactly, missing_row, row, rows_of, serve
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import Pass, Sampling, forward_passes
from isoforward.serve.quantised import quantise
from isoforward.serve.speculative import speculative_passes
from isoforward.serve.transformers_model import load_wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCHES = (1, 4, 16, 64)
PROMPTS = BATCHES[-1]
FEW = 4  # sequences of the ways that are slow
EXACT = "cached decode, exact"


@dataclass(frozen=True, kw_only=True)
class Way:
    """`serve(prompts, seed=, new_tokens=, temperature=)` is BadInput where it is not to be had here."""

    name: str
    batch: int
    prompts: Sequence[Sequence[int]]
    serve: Callable[..., Served]

    @property
    def about(self) -> dict[str, Condition]:
        return {"way": self.name, "batch": self.batch}


def own(name: str, model: GPT, prompts: Sequence[Sequence[int]], batch: int, passes: Passes = forward_passes) -> Way:
    return Way(name=name, batch=batch, prompts=prompts, serve=partial(serve, passes, model, batch=batch))


def usual_ways(case: Case, master: GPT, frozen: GPT, prompts: list[list[int]], count: int) -> Iterator[Way]:
    """Of PROMPTS prompts, which the large batches take all of, and the others the first `count`."""
    for batch in BATCHES:
        yield own("cached decode", frozen, prompts[: max(batch, count)], batch)
    yield own("left-padded batch", frozen, unlike(prompts), PROMPTS)
    few = prompts[: min(FEW, count)]
    yield own("uncached", frozen, few, 1, partial(forward_passes, cache=False))
    yield own("with a draft", frozen, few, 1, partial(speculative_passes, draft=frozen, draft_tokens=4))
    yield own("cached decode, compiled", frozen, few, len(few), compiled_passes)
    if case.precision == "fp32":
        yield own("cached decode in bf16", freeze(master, dtype=torch.bfloat16), prompts, PROMPTS)
        yield own("cached decode in int8", quantise(freeze(master)), prompts, PROMPTS)
    if find_spec("transformers") is not None:
        generate = partial(by_transformers, in_transformers(master))
        yield Way(name="Transformers' generate", batch=16, prompts=prompts[:16], serve=generate)


def exact_ways(master: GPT, frozen: GPT, rows: int, prompts: list[list[int]], count: int) -> Iterator[Way]:
    """With the bits of training's forward; `rows` is what `exact.fewest_rows` gave."""
    model = exactly(master, rows)
    passes = partial(forward_passes, exact=rows)
    for batch in BATCHES:
        yield own(EXACT, model, prompts[: max(batch, count)], batch, passes)
    yield own(f"{EXACT}, left-padded", model, unlike(prompts), PROMPTS, passes)
    drafted = partial(speculative_passes, draft=frozen, draft_tokens=4, exact=rows)
    yield own(f"{EXACT}, with a draft", model, prompts[: min(FEW, count)], 1, drafted)


def unlike(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of every length from 1 on."""
    return [list(prompt[: 1 + i % len(prompt)]) for i, prompt in enumerate(prompts)]


def compiled_passes(
    model: GPT, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling
) -> Iterator[Pass]:
    if missing := device_of("cpu").missing_compiler():
        raise BadInput(f"compiling needs {missing}")
    return forward_passes(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, compile=True)


def in_transformers(master: GPT) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as directory:
        place = export(freeze(master), Path(directory) / "export", tokenizer=None)
        return load_wrapped(place, dtype=master.dtype).model.eval()


def by_transformers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, seed: int, new_tokens: int, temperature: float = 1.0
) -> Served:
    """Its `generate`, for prompts of one length, at a temperature of 1 or 0."""
    torch.manual_seed(seed)
    tokens = torch.tensor(prompts)
    drawn = {"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode():
        told = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **drawn,
        )
    served = Served()
    for prompt, text, logits in zip(prompts, told.sequences, torch.stack(told.logits, dim=1), strict=True):
        served.add_logits(prompt, text[len(prompt) :].tolist(), logits)
    return served


def way_rows(case: Case, ways: Iterable[Way], count: int, master: GPT, double: GPT) -> Iterator[Row]:
    """Of the first `count` sequences of each, and of the greedy texts of a few; why, where a way is not to be had."""
    likeliest = Likeliest(master)
    for way in ways:
        try:
            served = way.serve(way.prompts, seed=case.seed, new_tokens=case.new_tokens).first(count)
            few = way.prompts[: min(FEW, count)]
            greedy = way.serve(few, seed=case.seed, new_tokens=case.new_tokens, temperature=0.0)
        except BadInput as refusal:
            yield missing_row(case, "difference", refusal, way.about, statistic="largest")
            continue
        yield from rows_of(case, way.about, served, master, double)
        yield row(case, "agreed", agreed(greedy, likeliest), way.about)
