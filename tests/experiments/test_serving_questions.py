"""Answers of the experiments about serving, on rows whose truth was planted."""

import re
from typing import Any

import pytest

from experiments import decode_batch, kv_cache, peers, precision, speculate
from isoforward.base.config import ExperimentConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Row
from isoforward.base.statistics import summarise
from isoforward.base.vocabulary import TRAINING
from isoforward.measure.case import Case
from isoforward.measure.passes import fields
from isoforward.measure.train_and_serve import context_flop_rows
from tests import planted
from tests.planted import noisy, results_of

MODEL = ModelConfig(layers=2, heads=4, width=32, context=64, vocab=61)
CASE = Case(experiment="planted", model=MODEL)


def row(life: str, phase: str, per: str, time_s: float, **conditions: Any) -> Row:
    return planted.timed(life, phase, per, noisy(time_s), **conditions)


def test_contexts_double_up_to_the_models_own() -> None:
    assert kv_cache.contexts(CASE) == [2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("power", [0.2, 1.0, 1.7])
def test_the_exponent_of_planted_times_is_found(power: Any) -> None:
    found = summarise(kv_cache.slopes({n: noisy(1e-6 * n**power) for n in (16, 32, 64, 128, 256)}))
    assert found.interval.low - 0.01 <= power <= found.interval.high + 0.01


def test_a_cache_pays_from_the_context_at_which_planted_times_cross() -> None:
    """20 µs a token with the cache, 4 µs a position without: equal at 5, so that 8 is the first that pays."""
    rows = []
    for cache in (True, False):
        times = {n: 20e-6 if cache else 4e-6 * n for n in kv_cache.contexts(CASE)}
        rows += [row("inference", "decode", "token", s, context=n, cache=cache) for n, s in times.items()]
        decode: dict[str, Any] = {"experiment": "planted", "life": "inference", "phase": "decode", "per": "token"}
        slopes = kv_cache.slopes({n: noisy(s) for n, s in times.items()})
        rows.append(Row(**decode, quantity="exponent", **fields(summarise(slopes)), conditions={"cache": cache}))
    rows += context_flop_rows(CASE, 64, "model")
    memory: dict[str, Any] = {"life": "inference", "phase": "decode", "quantity": "memory", "per": "sequence"}
    rows.append(Row(experiment="planted", **memory, value=65536.0, conditions={"context": 64}))
    told = kv_cache.answer(results_of(rows))
    assert told.startswith("A KV cache pays from a context of 8 on. At 64 it holds 64.0 KiB")
    assert "12.8x as fast" in told or "12.7x as fast" in told or "12.9x as fast" in told


def test_the_batch_that_levels_a_decoded_token_with_a_trained_one_is_found() -> None:
    """1 ms and 50 µs a sequence against 100 µs of a trained token's forward: level at 20. The weights are read at
    8 MB in 1 ms, where plain reading takes 0.8 ms: 76 % at a batch of 1."""
    rows = [
        row("training", "forward", "step", 100e-6 * 1000, tokens=1000),
        row("inference", "run", "run", 0.8e-3, kernel="plain read of the weights", bytes=8e6),
    ]
    for batch in (1, 16, 32):
        rows.append(row("inference", "decode", "step", 1e-3 + 50e-6 * batch, batch=batch))
        bytes_: dict[str, Any] = {"quantity": "bytes", "provenance": "predicted", "value": 8e6}
        about: dict[str, Any] = {"life": "inference", "phase": "decode", "per": "step", "conditions": {"batch": batch}}
        rows.append(Row(experiment="planted", **about, **bytes_))
    told = decode_batch.answer(results_of(rows))
    assert "from a batch of 32 on it is no dearer" in told
    assert "at 76% of the bandwidth of a plain read" in told or "at 77% of" in told or "at 75% of" in told


def test_speed_ups_and_accepted_proposals_are_told_with_their_intervals() -> None:
    rows = [row("inference", "decode", "token", 10e-3, draft_tokens=0)]
    rows.append(row("inference", "decode", "token", 5e-3, draft_tokens=4))
    for quantity, value in (("tokens a forward", 3.0), ("accepted", 0.5)):
        about: dict[str, Any] = {
            "life": "inference",
            "phase": "decode",
            "per": "token",
            "conditions": {"draft_tokens": 4},
        }
        rows.append(Row(experiment="planted", **about, quantity=quantity, value=value))
    told = speculate.answer(results_of(rows))
    assert re.search(r"4 proposed: 50% accepted, 3\.00 tokens a forward, time 0\.(50|49)\d*x \(", told)


def test_peers_are_asked_for_prompts_that_their_context_holds() -> None:
    assert peers.prompts(CASE) == [16]
    assert peers.prompts(Case(experiment="planted", model=ModelConfig(context=8, vocab=61))) == [7]


def test_each_peer_is_told_apart_by_what_was_planted() -> None:
    """Transformers takes twice our time in every phase, llama.cpp a third of it, and half of it to read a prompt; a
    compiled step takes half."""
    rows = []
    for peer, slower in ((peers.OURS, 1.0), (peers.THEIRS, 2.0)):
        rows += [row("training", phase, "step", slower * 8e-3, peer=peer) for phase in (*TRAINING, "step")]
        for life in ("training", "inference"):
            about: dict[str, Any] = {"life": life, "phase": "run", "quantity": "memory", "per": "step"}
            rows.append(Row(experiment="planted", **about, value=slower * 1e6, conditions={"peer": peer}))
    for peer, slower, reading in ((peers.OURS, 1.0, 1.0), (peers.THEIRS, 2.0, 2.0), (peers.LLAMA_CPP, 1 / 3, 0.5)):
        rows.append(row("inference", "prefill", "sequence", reading * 6e-3, peer=peer, prompt=16))
        rows.append(row("inference", "decode", "token", slower * 3e-3, peer=peer, prompt=64))
    rows.append(row("inference", "decode", "token", 0.5 * 3e-3, peer=peers.COMPILED, prompt=64))
    told = re.sub(r"(\d\.\d)\d*x \([^)]*\)", r"\1x", peers.answer(results_of(rows)))
    first, second, third = re.split(r" Against llama\.cpp: | Decode, compiled: ", told)
    parts = [*TRAINING, "step", "prefill of 16", "decode"]
    assert re.fullmatch(r".*: " + "; ".join(f"{part} 0.[45]x" for part in parts) + r"\. Peak .*", first)
    assert first.endswith("Peak memory: training 0.500x, inference 0.500x.")
    assert re.fullmatch(r"prefill of 16 (1\.9|2\.0)x; decode (2\.9|3\.0)x\.", second)
    outcomes = [r"against isoforward 0\.[45]x", r"against transformers 0\.2x", r"against llama\.cpp 1\.[45]x"]
    assert re.fullmatch("; ".join(outcomes) + r"\.", third)


def test_questions_about_trained_weights_ask_for_them() -> None:
    with pytest.raises(BadInput, match="write checkpoint=runs/latest"):
        precision.main(ExperimentConfig())
    with pytest.raises(BadInput, match="write checkpoint=BIG draft=SMALL"):
        speculate.main(speculate.Speculate())
    with pytest.raises(BadInput, match=r"batches=\[4\] must be two or more"):
        decode_batch.DecodeBatch(batches=[4])
