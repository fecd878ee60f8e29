"""Answers of the experiments on what lies between the lives, on rows whose truth was planted."""

import re
from typing import Any

import pytest
import torch

from experiments import adapters, rl_step
from isoforward.app.command_line import option
from isoforward.base.config import AdapterConfig, DataConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Row
from isoforward.data.corpus import prepare
from isoforward.measure.case import Case
from isoforward.measure.reinforcement import Shape
from tests import planted
from tests.planted import compared, noisy, results_of

MODEL = ModelConfig(layers=2, heads=4, width=32, context=64, vocab=10)


def row(phase: str, time_s: float, **conditions: Any) -> Row:
    return planted.timed("training", phase, "step", noisy(time_s), **conditions)


def plain(life: str, phase: str, quantity: str, value: float, per: str = "step", **conditions: Any) -> Row:
    how: dict[str, Any] = {"convention": "model"} if quantity == "flops" else {}
    about: dict[str, Any] = {"life": life, "phase": phase, "quantity": quantity, "per": per}
    return Row(experiment="planted", **about, **how, value=value, conditions=conditions)


def test_counting_judges_each_digit_by_the_one_before() -> None:
    prompts, answers = torch.tensor([[5, 8], [0, 0], [3, 3]]), torch.tensor([[9, 0, 1], [1, 2, 5], [3, 3, 3]])
    assert torch.equal(rl_step.counting(prompts, answers), torch.tensor([1.0, 2 / 3, 0.0]))
    assert torch.equal(rl_step.perfect(prompts, answers), torch.tensor([1.0, 0.0, 0.0]))


def test_a_sweep_changes_one_size_at_a_time_and_none_beyond_the_context() -> None:
    shape = Shape(prompts=4, group=8, prompt=8, new_tokens=16)
    found = rl_step.sweep(shape, 64)
    assert found[0] == shape and len(set(found)) == len(found)
    assert all(each.length < 64 for each in found) and Shape(prompts=4, group=8, prompt=8, new_tokens=64) not in found
    for each in found[1:]:
        keys = ("prompts", "group", "prompt", "new_tokens", "epochs")
        assert sum(getattr(each, key) != getattr(shape, key) for key in keys) == 1


def test_where_rollout_is_half_is_found_between_two_sizes() -> None:
    def share(value: float, new_tokens: int) -> Row:
        return plain("training", "step", "rollout", value, new_tokens=new_tokens)

    assert rl_step.crossing([share(0.3, 8), share(0.4, 16), share(0.6, 32)], "new_tokens") == "at about 24.0"
    assert rl_step.crossing([share(0.6, 8), share(0.7, 32)], "new_tokens").startswith("nowhere from 8 to 32")


def test_an_rl_step_is_told_by_its_planted_shares() -> None:
    at: dict[str, Any] = {"batch": 8, "group": 4, "prompt": 2, "new_tokens": 16, "epochs": 1}
    whole, supervised = row("step", 0.1, **at), row("step", 0.04, batch=8)
    rows = [whole, supervised, row("residual", 0.0002, **at)]
    rows += [
        plain("training", "step", "rollout", share, **{**at, "new_tokens": n})
        for n, share in ((16, 0.3), (4, 0.1), (64, 0.7))
    ]
    for way, low, high in (("usual", 0.99998, 1.00001), ("exact", 1.0, 1.0)):
        for statistic, ratio in (("smallest", low), ("largest", high)):
            rows.append(plain("training", "old policy", "importance ratio", ratio, **at, way=way, statistic=statistic))
    rollouts = [
        planted.timed("inference", "rollout", "step", noisy(t), **at, way=w)
        for w, t in (("exact", 0.06), ("usual", 0.03))
    ]
    rows += rollouts
    for seed in (1, 2):
        for which, low, high in (("first", 0.1, 0.2), ("last", 0.8, 0.9) if seed == 1 else ("last", 0.15, 0.3)):
            told: dict[str, Any] = {"low": low, "high": high, "interval": "order statistics", "confidence": 0.95}
            about: dict[str, Any] = {"life": "training", "phase": "run", "quantity": "reward", "per": "sequence"}
            where = {"seed": seed, "which": f"{which} 10 steps", "training_time_s": 12.0}
            rows.append(Row(experiment="planted", **about, value=(low + high) / 2, **told, conditions=where))
    said = rl_step.answer(results_of(rows, [compared(whole, supervised), compared(*rollouts)]))
    assert "30% of it rollout" in said and re.search(r"it takes 2\.[45]\dx", said) and "leave 0.20% of it" in said
    assert "in 70% of the time at best" in said
    assert "rollout equals the rest at about 40.0 (tokens an answer)" in said
    assert "over its sampler's is 1 within 2e-05; with exact rollout it is exactly 1" in said
    assert re.search(r"and rollout takes (2\.0|1\.9|2\.1)\d?x", said)
    assert "from 0.15 to 0.85 in 12.0 s, up significantly under 1 of 2 seeds" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"reward": "count"}, "did you mean counting?"),
        ({"group": 1}, "group=1 must be a finite number of at least 2"),
        ({"new_tokens": 300}, r"prompt \+ new_tokens = 308 is longer than model.context=256; write model.context=308"),
        ({"steps": 3}, "steps=3 are too few to see learning; write steps=20 or more, or 0 for none"),
        ({"checkpoint": "runs/latest"}, "rewards here judge digits"),
        ({"model": ModelConfig(source="hf", path="DIR")}, "model.path= has a tokenizer of its own"),
    ],
)
def test_what_a_step_cannot_be_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        rl_step.RlStep(**keys)


def test_a_preset_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="model: llama9 is no option; conf/model has them"):
        option("model", "llama9")
    assert option("model", "llama3_8b").layers == 32


# Adapters


def test_every_rank_is_a_case_of_its_own_and_one_above_the_width_is_refused() -> None:
    case = Case(experiment="adapters", model=MODEL)
    found = adapters.ways(case, adapters.Adapters(ranks=[2, 8], targets=["q", "v"]))
    told = ["full", "head alone", "LoRA, r=2 on q, v", "LoRA, r=8 on q, v", "LoRA, r=2 on q, v over int8"]
    assert [adapters.way_of(each) for each in found] == told
    with pytest.raises(BadInput, match=r"ranks: 64 is above the width of a map, \d+; write ranks=\[4,8\]$"):
        adapters.ways(case, adapters.Adapters(ranks=[4, 8, 64]))


def test_the_other_case_is_the_same_text() -> None:
    corpus = prepare(DataConfig(source="synthetic", tokenizer="char"))
    turned = adapters.other_case(corpus)
    text = corpus.tokenizer.decode(corpus.validation[:50].tolist())
    known = set(corpus.tokenizer.backend.get_vocab())
    wanted = "".join(letter.swapcase() if letter.swapcase() in known else letter for letter in text)
    assert corpus.tokenizer.decode(turned.validation[:50].tolist()) == wanted


def test_merging_is_seen_in_the_logits_and_is_rounding() -> None:
    case = Case(experiment="adapters", model=MODEL, batch=1, length=8, adapter=AdapterConfig(name="lora", rank=2))
    moved = adapters.difference(case).value
    assert moved is not None and 0 < moved < 1e-5


@pytest.mark.parametrize(("energy", "paid"), [(False, ("105 GFLOP", "140 GFLOP")), (True, ("600 J", "800 J"))])
def test_what_a_part_saves_is_told_from_planted_rows(energy: bool, paid: tuple[str, str]) -> None:
    steps = {
        "full": row("step", 0.1, adapter="full"),
        "LoRA, r=4": row("step", 0.08, adapter="LoRA, r=4"),
    }
    rows = [*steps.values()]
    for name, forward, backward, state in (("full", 100, 200, 8000), ("LoRA, r=4", 104, 110, 80)):
        rows.append(plain("training", "forward", "flops", forward, adapter=name))
        rows.append(plain("training", "backward", "flops", backward, adapter=name))
        rows.append(plain("training", "optimizer", "state", state, per="run", adapter=name))
        for step, loss in ((10, 3.0), (20, 2.0 if name == "full" else 2.5)):  # full is at 2.5 midway, at step 15
            at: dict[str, Any] = {"adapter": name, "step": step}
            rows.append(plain("training", "run", "loss", loss, "token", **at, training_time_s=step / 10))
            rows.append(plain("training", "run", "loss_by_flops", loss, "token", **at, training_gflop=step * 7.0))
    if energy:
        rows += [plain("training", "step", "energy", 40.0, adapter=name) for name in steps]
    rows.append(plain("inference", "forward", "difference", 2e-6, per="token", compared="merged and beside"))
    rows[-1] = Row(**{**vars(rows[-1]), "unit": "logit"})
    said = adapters.answer(results_of(rows, [compared(steps["LoRA, r=4"], steps["full"])]))
    assert "full: forward 1.00, backward 2.00" in said
    assert re.search(r"LoRA, r=4: forward 1\.04, backward 1\.10, optimizer state 80\.0 B, step 0\.[78]\d*x", said)
    assert "Merging moves logits by 2e-06 at most" in said
    assert f"2.500 nats in 1.50 s and {paid[0]};" in said and f"2.500 nats in 2.00 s and {paid[1]}." in said
