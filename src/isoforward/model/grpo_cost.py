"""What a GRPO step computes and moves, phase by phase: what both lives cost, put together.

Letters and conventions: cost.py. All answers are `new` tokens long, and every prompt is read once for each answer.
"""

from __future__ import annotations

from isoforward.base.config import ModelConfig
from isoforward.model import cost, footprint

PASSES = ("old policy", "reference policy")  # forwards that keep nothing


def grpo_flops(
    config: ModelConfig,
    *,
    batch: int,
    prompt: int,
    new: int,
    epochs: int = 1,
    convention: str = "model",
    optimizer: str = "adamw",
) -> dict[str, int]:
    """`batch` answers. Training's forward reads all but the last token."""
    length = prompt + new - 1
    rollout = cost.generation_flops(config, batch=batch, prompt=prompt, new=new, convention=convention).total
    read = cost.forward_flops(config, batch=batch, length=prompt, logits="last", convention=convention).total
    forward = cost.forward_flops(config, batch=batch, length=length, convention=convention).total
    backward = cost.backward_flops(config, batch=batch, length=length, convention=convention).total
    return {
        "prefill": read,
        "decode": rollout - read,
        **dict.fromkeys(PASSES, forward),
        "forward": epochs * forward,
        "backward": epochs * backward,
        "optimizer": epochs * cost.optimizer_flops(config, optimizer=optimizer)["products"],
    }


def grpo_bytes(
    config: ModelConfig,
    *,
    batch: int,
    prompt: int,
    new: int,
    epochs: int = 1,
    dtype: str = "fp32",
    optimizer: str = "adamw",
) -> dict[str, int]:
    """Least traffic: footprint.py's, and for the hand-over every fp32 master read and every served weight written."""
    length = prompt + new - 1
    update = footprint.training_bytes(config, batch=batch, length=length, dtype=dtype, optimizer=optimizer)
    forward = footprint.forward_bytes(config, batch=batch, length=length, dtype=dtype).total
    read = footprint.inference_bytes(config, batch=batch, length=prompt, dtype=dtype).total
    decoded = (
        footprint.inference_bytes(config, batch=batch, cached=cached, dtype=dtype).total
        for cached in range(prompt, length)
    )
    return {
        "hand-over": footprint.weight_bytes(config, dtype="fp32") + footprint.weight_bytes(config, dtype=dtype),
        "prefill": read,
        "decode": sum(decoded),
        **dict.fromkeys(PASSES, forward),
        **{phase: epochs * moved for phase, moved in update.items()},
    }
