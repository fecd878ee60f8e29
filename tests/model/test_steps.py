"""The step that training takes is the one a textbook writes; each phase is announced around its own work."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from isoforward.model.gpt import GPT, KVCache
from isoforward.model.steps import decode, prefill, train_step, verify
from tests.conftest import tiny


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(tiny())


def test_a_step_is_forward_loss_backward_update(model: GPT, tokens: torch.Tensor) -> None:
    reference = copy.deepcopy(model)
    x, y = tokens[:, :-1], tokens[:, 1:]
    loss, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
    expected = F.cross_entropy(reference(x).flatten(0, 1), y.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None and ours.grad is None
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_micro_batches_take_the_same_step(model: GPT) -> None:
    tokens = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    for each, parts in ((model, 1), (other, 4)):
        train_step(each, torch.optim.SGD(each.parameters(), lr=0.1), tokens[:, :-1], tokens[:, 1:], accumulate=parts)
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another)


def test_the_norm_is_that_before_clipping(model: GPT, tokens: torch.Tensor) -> None:
    before = copy.deepcopy(model)
    _, norm = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), tokens[:, :-1], tokens[:, 1:], clip=0.01)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    moved = torch.stack([(one - other).norm() for one, other in pairs]).norm()
    assert float(norm) > 0.01
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_leaves_the_weights(model: GPT, tokens: torch.Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def infinite(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.sum() * float("inf")

    with pytest.raises(RuntimeError, match="non-finite"):
        train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], criterion=infinite)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_phases_are_announced_in_order_and_never_nested(model: GPT, tokens: torch.Tensor) -> None:
    seen: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append(f"/{name}")

    x, y = tokens[:2, :-1], tokens[:2, 1:]
    train_step(model, torch.optim.SGD(model.parameters()), x, y, accumulate=2, phase=phase)
    part = ["forward", "/forward", "loss", "/loss", "backward", "/backward"]
    assert seen == [*part, *part, "optimizer", "/optimizer"]


def test_serving_gives_the_logits_of_the_last_position_or_of_all(model: GPT, tokens: torch.Tensor) -> None:
    model.eval()
    with torch.inference_mode():
        whole = model(tokens)

    def cache() -> KVCache:
        return KVCache(model.config, batch=len(tokens), capacity=tokens.shape[1], dtype=model.dtype, device="cpu")

    torch.testing.assert_close(prefill(model, tokens, cache()), whole[:, -1])
    one, several = cache(), cache()
    prefill(model, tokens[:, :-1], one)
    torch.testing.assert_close(decode(model, tokens[:, -1:], one), whole[:, -1])
    prefill(model, tokens[:, :-4], several)
    torch.testing.assert_close(verify(model, tokens[:, -4:], several), whole[:, -4:])
