"""One step of group relative policy optimisation: inference and training of the same weights in one loop.

    inference   hand-over  prefill  decode  sampling        the policy, frozen, answers each prompt `group` times
                reward                                      a program judges the answers; nothing is computed
                old policy  reference policy                training's forward over the answers, nothing kept
    training    forward  loss  backward  optimizer          once an epoch: steps.train_step itself

GRPO: Shao 2024 (DeepSeekMath), section 4.1 and algorithm 1. As in steps.py, nothing here knows how a phase is measured,
or how answers are sampled: `sample` is handed over, since serving knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from isoforward.model.gpt import GPT
from isoforward.model.steps import Phase, train_step, unmeasured


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """`logprobs` (B, N) are the sampler's own, of the last N of `tokens` (B, P + N)."""

    tokens: Tensor
    logprobs: Tensor

    @property
    def answers(self) -> Tensor:
        """(B, N)"""
        return self.tokens[:, -self.logprobs.shape[1] :]


Sample = Callable[[GPT, Tensor, Phase], Rollout]
Reward = Callable[[Tensor, Tensor], Tensor]  # prompts (B, P) and answers (B, N) to (B,)


@dataclass(frozen=True, kw_only=True)
class Plan:
    group: int = 8  # answers to one prompt, which are judged against each other
    epochs: int = 1  # updates on the same answers
    clip_ratio: float = 0.2  # how far an update may move a token's probability, as a ratio
    kl: float = 0.04  # weight of the distance from the reference policy
    clip: float | None = 1.0  # of the gradient's norm


@dataclass(frozen=True, kw_only=True)
class Outcome:
    rewards: Tensor  # (B,)
    importance: Tensor  # (B, N), a token's probability under the policy that learns over that under its sampler
    loss: Tensor  # of the last epoch


def grpo_step(
    policy: GPT,
    optimizer: Optimizer,
    prompts: Tensor,
    *,
    sample: Sample,
    reward: Reward,
    reference: GPT,
    plan: Plan,
    phase: Phase = unmeasured,
) -> Outcome:
    """On prompts (B, P), each of them `plan.group` times in a row.

    `importance` is of before the first update. It is 1 where both lives give the same bits; usual decode's last bits
    are others, so that even the first update is a little off its policy.
    """
    rolled = sample(policy, prompts, phase)
    tokens = rolled.tokens
    with phase("reward"):
        rewards = reward(prompts, rolled.answers)
        advantages = group_advantages(rewards, plan.group)
    with phase("old policy"), torch.no_grad():
        old = answer_logprobs(policy, rolled)
        importance = (old - rolled.logprobs).exp()
    with phase("reference policy"), torch.no_grad():
        kept = answer_logprobs(reference, rolled)

    def criterion(logits: Tensor, answers: Tensor) -> Tensor:
        """Of logits (B, P + N - 1, V)."""
        new = logprobs_of(logits, rolled)
        return policy_loss(new, old, kept, advantages, clip_ratio=plan.clip_ratio, kl=plan.kl)

    for _ in range(plan.epochs):
        loss, _ = train_step(
            policy, optimizer, tokens[:, :-1], rolled.answers, clip=plan.clip, criterion=criterion, phase=phase
        )
    return Outcome(rewards=rewards, importance=importance, loss=loss)


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Rewards (B,) less the mean of their group, over its standard deviation: (B,). 0 where a group is all alike."""
    grouped = rewards.view(-1, group)
    spread = grouped - grouped.mean(1, keepdim=True)
    return (spread / (grouped.std(1, keepdim=True, correction=0) + 1e-6)).flatten()


def answer_logprobs(model: GPT, rolled: Rollout) -> Tensor:
    """Of each answered token, by training's forward over all of the text at once: (B, N)"""
    return logprobs_of(model(rolled.tokens[:, :-1]), rolled)


def logprobs_of(logits: Tensor, rolled: Rollout) -> Tensor:
    """logits (B, P + N - 1, V) to those of the answers, (B, N), in fp32"""
    answers = rolled.answers
    last = logits[:, -answers.shape[1] :].float()
    return last.log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)


def policy_loss(
    new: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, *, clip_ratio: float, kl: float
) -> Tensor:
    """Log-probabilities (B, N) and advantages (B,) to the mean over tokens, (): Shao 2024, eq. 3 and 4."""
    ratio, gain = (new - old).exp(), advantages[:, None]
    kept = torch.minimum(ratio * gain, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * gain)
    apart = reference - new
    return -(kept - kl * (apart.exp() - apart - 1)).mean()
