import pytest

from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import lookup
from isoforward.model import cost
from isoforward.plan.lifetime import Assumptions, plan
from isoforward.plan.reinforcement import grpo_step_s

LLAMA3_8B = ModelConfig(
    family="llama", layers=32, heads=32, kv_heads=8, width=4096, ffn=14336, context=8192, vocab=128256, tied=False
)
PLAN = plan(Assumptions(model=LLAMA3_8B, prompt=512, new_tokens=256, decode_batch=64), lookup("h100"))


def test_the_update_takes_its_flops_at_the_assumed_share_of_the_peak() -> None:
    found = grpo_step_s(PLAN, batch=64, prompt=512, new=256, epochs=2)
    forward = cost.forward_flops(LLAMA3_8B, batch=64, length=767).total
    assert found["forward"] == pytest.approx(2 * forward / (989.4e12 * 0.4), rel=0.01)
    assert found["backward"] == pytest.approx(2 * found["forward"])


def test_decode_is_bound_by_weights_and_caches() -> None:
    """By hand: 255 steps that read 15 GB of weights, and keys and values of 64 answers, at 3/4 of 3.35 TB/s."""
    found = grpo_step_s(PLAN, batch=64, prompt=512, new=256)
    weights = 2 * (cost.parameters(LLAMA3_8B).total - 128256 * 4096)
    cached = 64 * 2 * 32 * 1024 * 2 * (512 + 128)
    assert found["decode"] == pytest.approx(255 * (weights + cached) / (3.35e12 * 0.75), rel=0.02)


def test_longer_answers_are_more_rollout_and_more_epochs_less() -> None:
    def share(new: int, epochs: int = 1) -> float:
        times = grpo_step_s(PLAN, batch=64, prompt=512, new=new, epochs=epochs)
        return (times["hand-over"] + times["prefill"] + times["decode"]) / sum(times.values())

    assert share(64) < share(256) < share(1024)
    assert share(256, epochs=4) < share(256)
