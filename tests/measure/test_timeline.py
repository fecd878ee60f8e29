"""Its highest moments are the ledger's peaks."""

from __future__ import annotations

from functools import partial

import torch
from torch.optim import SGD

from isoforward.base.config import ModelConfig
from isoforward.measure.flops import fused_attention
from isoforward.measure.memory_ledger import training_ledger, watch_training
from isoforward.measure.timeline import Timeline
from isoforward.model import steps
from isoforward.model.gpt import GPT

CONFIG = ModelConfig(family="llama", layers=3, heads=4, width=64, context=32, vocab=200)


def test_the_highest_moment_of_each_phase_is_its_peak_and_weights_are_there_throughout() -> None:
    with torch.device("meta"):
        model, tokens = GPT(CONFIG), torch.zeros(2, 32, dtype=torch.long)
    step = partial(steps.train_step, clip=1.0)
    with fused_attention():
        peaks = training_ledger(model, SGD(model.parameters(), lr=0.1), tokens, tokens, step=step).peaks
        model.zero_grad(set_to_none=True)
        watch = Timeline(model, tokens.device)
        watch_training(watch, model, SGD(model.parameters(), lr=0.1), tokens, tokens, step=step)
    found = watch.moments()
    assert {phase: max(moment.held.total for moment in moments) for phase, moments in found.items()} == peaks
    weights = {moment.held["weights"] for moments in found.values() for moment in moments}
    assert len(weights) == 1
    assert found["optimizer"][0].held["gradients"] == 4 * sum(p.numel() for p in model.parameters())
