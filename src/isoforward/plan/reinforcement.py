"""A GRPO step on hardware that is not here: how much of it is rollout, from shapes and peaks alone."""

from __future__ import annotations

from isoforward.base.config import at_least
from isoforward.model import cost, footprint
from isoforward.model.grpo_cost import PASSES, grpo_bytes
from isoforward.plan.lifetime import Plan


def grpo_step_s(plan: Plan, *, batch: int, prompt: int, new: int, epochs: int = 1) -> dict[str, float]:
    """Seconds by phase, on `plan`'s devices as if they were one: `batch` answers, all decoded at once.

    Prompts, the two passes and the update are bound by their products, at the shares of the peak that `plan` assumes;
    decode by the weights and each answer's own keys and values; hand-over and optimizer by what they move.
    """
    at_least("new_tokens", new, 1)
    model, asked = plan.model, plan.asked
    read = cost.forward_flops(model, batch=batch, length=prompt, logits="last").total
    moved = footprint.inference_bytes(model, batch=batch, length=prompt, dtype=asked.precision).total
    decode_s = 0.0
    if new > 1:
        ends = [plan.decoded_token_s(cached, batch) for cached in (prompt, prompt + new - 2)]
        decode_s = batch * (new - 1) * sum(ends) / 2  # what is cached grows by one a step
    forward = cost.forward_flops(model, batch=batch, length=prompt + new - 1).total
    backward = cost.backward_flops(model, batch=batch, length=prompt + new - 1).total
    bytes_of = grpo_bytes(model, batch=batch, prompt=prompt, new=min(new, 2), epochs=epochs, dtype=asked.precision)
    training = plan.peak * asked.training_mfu
    return {
        "hand-over": bytes_of["hand-over"] / plan.bytes_per_s,
        "prefill": plan.bound_s(read, moved),
        "decode": decode_s,
        **dict.fromkeys(PASSES, forward / (plan.peak * asked.prefill_mfu)),
        "forward": epochs * forward / training,
        "backward": epochs * backward / training,
        "optimizer": bytes_of["optimizer"] / plan.bytes_per_s,
    }
