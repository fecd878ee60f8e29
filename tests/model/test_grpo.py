"""The step against its paper, by hand and by numbers; what it leaves alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from isoforward.base.config import OptimConfig
from isoforward.formats.export import freeze
from isoforward.model.gpt import GPT
from isoforward.model.grpo import Plan, Rollout, group_advantages, grpo_step, logprobs_of, policy_loss
from isoforward.model.optim import build
from isoforward.model.steps import Phase, unmeasured
from tests.conftest import lively, tiny


def test_advantages_are_a_groups_own() -> None:
    """Rewards 1, 3 have mean 2 and deviation 1; a group that is all alike says nothing."""
    found = group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_the_loss_is_that_of_the_paper_written_out() -> None:
    """Shao 2024, eq. 3 with the estimator of eq. 4, token by token."""
    torch.manual_seed(0)
    new, old, kept = (torch.randn(3, 4) * 0.5 - 2 for _ in range(3))
    advantages = torch.tensor([1.5, -0.7, 0.0])
    terms = []
    for i in range(3):
        for t in range(4):
            ratio = float((new[i, t] - old[i, t]).exp())
            clipped = min(max(ratio, 0.8), 1.2)
            gain = float(advantages[i])
            apart = float(kept[i, t] - new[i, t])
            distance = float(torch.tensor(apart).exp()) - apart - 1
            terms.append(min(ratio * gain, clipped * gain) - 0.04 * distance)
    loss = policy_loss(new, old, kept, advantages, clip_ratio=0.2, kl=0.04)
    assert float(loss) == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize(("gain", "log_ratio"), [(1.0, 0.5), (-1.0, -0.5)])
def test_what_has_gone_far_enough_is_pulled_no_further(gain: float, log_ratio: float) -> None:
    new = torch.full((1, 1), log_ratio, requires_grad=True)
    zero = torch.zeros(1, 1)
    policy_loss(new, zero, zero, torch.tensor([gain]), clip_ratio=0.2, kl=0.0).backward()
    assert new.grad is not None and float(new.grad) == 0


def fixed(policy: GPT, prompts: Tensor, phase: Phase) -> Rollout:
    """Answers by no sampler, with the log-probabilities that the policy gives them."""
    with phase("decode"), torch.no_grad():
        answers = torch.arange(len(prompts) * 6).view(len(prompts), 6) % 61
        rolled = Rollout(tokens=torch.cat((prompts, answers), dim=1), logprobs=torch.zeros(len(prompts), 6))
        return Rollout(tokens=rolled.tokens, logprobs=logprobs_of(policy(rolled.tokens[:, :-1]), rolled))


def first_tokens(prompts: Tensor, answers: Tensor) -> Tensor:
    return answers[:, 0].float()


def stepped(plan: Plan, phase: Phase = unmeasured, steps: int = 1) -> tuple[GPT, Tensor, Tensor]:
    """The policy, log-probabilities of its answers before and after."""
    torch.manual_seed(1)
    policy = lively(GPT(tiny()))
    optimizer = build(policy, OptimConfig(lr=1e-3))
    prompts = torch.randint(61, (4, 5), generator=torch.Generator().manual_seed(2))
    before = fixed(policy, prompts, unmeasured)
    reference = freeze(policy)
    for _ in range(steps):
        outcome = grpo_step(
            policy, optimizer, prompts, sample=fixed, reward=first_tokens, reference=reference, plan=plan, phase=phase
        )
        assert torch.equal(outcome.importance, torch.ones(4, 6))  # the sampler's bits are training's
    return policy, before.logprobs, fixed(policy, prompts, unmeasured).logprobs


def test_better_answers_of_a_group_get_likelier_and_worse_ones_less() -> None:
    _, before, after = stepped(Plan(group=2, kl=0.0), steps=3)
    gained = (after - before).sum(1)
    assert (gained[1::2] > 0).all() and (gained[::2] < 0).all()  # rewards are 0, 6 and 12, 18


def test_epochs_are_updates_on_the_same_answers_and_phases_come_in_order() -> None:
    seen: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    once, _, _ = stepped(Plan(group=2))
    twice, _, _ = stepped(Plan(group=2, epochs=2), phase)
    update = ["forward", "loss", "backward", "optimizer"]
    assert seen == ["decode", "reward", "old policy", "reference policy", *update, *update]
    assert not torch.equal(once.embedding.weight, twice.embedding.weight)
    assert all(parameter.grad is None for parameter in twice.parameters())
