"""The static cache is what is compiled; it is held to the growing one, step by step, and compiled in the slow tests."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from isoforward.base.config import MeasureConfig
from isoforward.formats.export import freeze
from isoforward.measure import train_and_serve
from isoforward.measure.case import Case, batch_of
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.steps import decode, prefill
from isoforward.serve import decoding
from isoforward.serve.compiled import StaticKVCache, compiled_decode, one_more
from isoforward.serve.decoding import Sampling, forward_passes
from tests.conftest import lively, tiny


def differing(step: Callable[..., torch.Tensor], tokens: torch.Tensor, padding: torch.Tensor | None = None) -> float:
    """The largest difference of logits between a static cache and a growing one, over several steps."""
    model = freeze(lively(GPT(tiny())))
    past = [KVCache(model.config, batch=3, capacity=24, dtype=torch.float32, padding=padding) for _ in range(2)]
    for each in past:
        each.fill(float("nan"))  # what memory may hold
        prefill(model, tokens[:, :12], each)
    static, worst = StaticKVCache(past[1]), 0.0
    with torch.inference_mode():
        for at in range(12, 20):
            expected = decode(model, tokens[:, at : at + 1], past[0])
            worst = max(worst, float((step(model, tokens[:, at : at + 1], static) - expected).abs().max()))
    return worst


def test_a_static_cache_gives_the_logits_of_a_growing_one(tokens: torch.Tensor) -> None:
    assert differing(one_more, tokens) < 1e-5


def test_a_static_cache_keeps_to_its_rows_padding(tokens: torch.Tensor) -> None:
    assert differing(one_more, tokens, padding=torch.tensor([0, 5, 11])) < 1e-5


@pytest.mark.parametrize("mutated", ["positions", "mask"])
def test_a_mutation_of_the_static_cache_is_noticed(
    mutated: str, monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor
) -> None:
    original = getattr(StaticKVCache, mutated)
    wrong = {
        "positions": lambda self, count: original(self, count) + 1,
        "mask": lambda self, count: original(self, count) & (self.places != 3),
    }
    monkeypatch.setattr(StaticKVCache, mutated, wrong[mutated])
    assert not differing(one_more, tokens) < 1e-4


def test_a_compiled_case_is_measured_on_the_compiled_step_and_what_the_prompt_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In place of compiling, the step that would be compiled: at every position it gives the growing cache's logits."""
    case = Case(experiment="planted", model=tiny(), batch=2, length=16, measure=MeasureConfig(prompt=8, new_tokens=6))
    model, tokens = freeze(lively(GPT(tiny()))), batch_of(case)[0]
    seen = {}

    def counted(gpt: GPT, token: torch.Tensor, cache: StaticKVCache) -> torch.Tensor:
        at = int(cache.length)
        seen[at] = one_more(gpt, token, cache)
        return seen[at]

    monkeypatch.setattr(train_and_serve, "compiled_decode", lambda device: torch.inference_mode()(counted))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    serving = train_and_serve.Serving(replace(case, compile=True), model, tokens)
    assert len(serving.generation.run(1)) == 2
    assert sorted(seen) == [8, 9, 10, 11, 12]
    text = tokens.flatten()[None, :8]
    past = KVCache(model.config, batch=1, capacity=32, dtype=torch.float32)
    prefill(model, text, past)
    chosen = text[:, :1]
    for at in range(8, 13):
        logits = decode(model, chosen, past)
        torch.testing.assert_close(seen[at], logits, atol=1e-5, rtol=1e-4)
        chosen = logits.argmax(-1, keepdim=True)
    seen.clear()
    for work in serving.curve:
        work.run(1)
    assert sorted(seen) == [context - 1 for context in case.contexts]


def test_a_compiled_step_sees_tokens_of_one_layout_and_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = set()

    def watched(model: GPT, token: torch.Tensor, cache: StaticKVCache) -> torch.Tensor:
        layouts.add((token.shape, token.stride(), cache.capacity))
        return one_more(model, token, cache)

    for module in (decoding, train_and_serve):
        monkeypatch.setattr(module, "compiled_decode", lambda device: torch.inference_mode()(watched))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = freeze(lively(GPT(tiny())))
    for prompt in ([1, 2, 3], [4, 5, 6, 7]):
        assert len(list(forward_passes(model, [prompt], max_new_tokens=8, sampling=Sampling(), compile=True))) == 8
    case = Case(
        experiment="planted", model=tiny(), length=16, measure=MeasureConfig(prompt=8, new_tokens=6), compile=True
    )
    serving = train_and_serve.Serving(case, model, batch_of(case)[0])
    for work in (serving.forward, serving.generation, *serving.curve):
        work.run(1)
    assert layouts == {((1, 1), (1, 1), tiny().context)}


@pytest.mark.slow
def test_the_compiled_step_gives_the_logits_of_the_eager_one(tokens: torch.Tensor) -> None:
    assert differing(compiled_decode("cpu"), tokens) < 1e-5


@pytest.mark.slow
def test_a_compiled_generation_writes_what_an_eager_one_writes() -> None:
    model = freeze(lively(GPT(tiny())))
    greedy = Sampling(temperature=0)

    def texts(**how: Any) -> list[list[int]]:
        prompts = [[1, 2, 3, 4], [5], [6, 7]]
        return [step.tokens for step in forward_passes(model, prompts, max_new_tokens=8, sampling=greedy, **how)]

    assert texts(compile=True) == texts()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_graph_writes_what_an_eager_step_writes(dtype: torch.dtype) -> None:
    model = freeze(lively(GPT(tiny(), dtype=dtype))).to("cuda")
    greedy = Sampling(temperature=0)
    found = [
        [step.tokens for step in forward_passes(model, [[1, 2, 3]], max_new_tokens=20, sampling=greedy, compile=asked)]
        for asked in (False, True)
    ]
    assert found[0] == found[1]
