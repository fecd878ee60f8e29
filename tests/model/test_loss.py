"""The sliced loss is F.cross_entropy, its gradient too, and it holds no second copy of the logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoforward.base.errors import BadInput
from isoforward.model import loss as subject
from isoforward.model.loss import next_token_loss

B, T, V = 3, 7, 61


def drawn(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(B, T, V, generator=generator) * scale
    return logits.to(dtype).requires_grad_(), torch.randint(V, (B, T), generator=generator)


@pytest.mark.parametrize("rows", [1, 4, B * T, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("scale", [3.0, 3000.0])
def test_value_and_gradient_are_those_of_the_whole_in_double_precision(
    rows: int, dtype: torch.dtype, tolerance: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient in bf16 is rounded once: half a unit in its last place, 2^-8."""
    monkeypatch.setattr(subject, "LOSS_SLICE", rows * V)
    logits, targets = drawn(dtype, scale)
    found = next_token_loss(logits, targets)
    (found / 4).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten())
    (expected / 4).backward()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-8, rtol=tolerance)


class Largest(TorchDispatchMode):
    """Elements of the largest fp32 tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [
            leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32
        ]
        self.elements = max([self.elements, *made])
        return result


def test_no_more_than_a_slice_is_ever_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LOSS_SLICE", 4 * V)
    logits, targets = drawn(torch.bfloat16)
    with Largest() as largest:
        next_token_loss(logits, targets).backward()
    assert largest.elements == 4 * V


def test_logits_are_left_as_they_are() -> None:
    logits, targets = drawn()
    before = logits.detach().clone()
    next_token_loss(logits, targets).backward()
    assert torch.equal(logits, before)


def test_a_logit_that_is_not_finite_makes_the_loss_so() -> None:
    for wrong in (float("nan"), float("inf")):
        logits, targets = drawn()
        with torch.no_grad():
            logits[1, 2, 3] = wrong
        assert not next_token_loss(logits, targets).isfinite()


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("left_out", [[], [0], [1, 5, 6], list(range(B * T))])
def test_targets_of_minus_100_count_for_nothing_as_in_torch(
    rows: int, left_out: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "LOSS_SLICE", rows * V)
    logits, targets = drawn()
    targets.flatten()[left_out] = -100
    theirs = logits.detach().clone().requires_grad_()
    found, expected = next_token_loss(logits, targets), F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found, expected, equal_nan=True)
    found.backward()
    expected.backward()
    assert logits.grad is not None and theirs.grad is not None
    if len(left_out) < B * T:
        torch.testing.assert_close(logits.grad, theirs.grad, atol=1e-8, rtol=1e-5)
        assert not logits.grad.flatten(0, 1)[left_out].any()


def test_padding_changes_no_mean() -> None:
    logits, targets = drawn()
    padded = torch.cat((logits.detach(), torch.randn(B, 2, V)), 1)
    ignored = torch.cat((targets, torch.full((B, 2), -100)), 1)
    torch.testing.assert_close(next_token_loss(padded, ignored), next_token_loss(logits, targets))


def test_rows_of_a_classifier_are_taken_too() -> None:
    logits, targets = drawn()
    assert torch.equal(next_token_loss(logits[:, 0], targets[:, 0]), next_token_loss(logits[:, :1], targets[:, :1]))


@pytest.mark.parametrize("wrong", [-1, V, -101])
def test_any_other_target_outside_the_vocabulary_is_an_error_as_in_torch(wrong: int) -> None:
    logits, targets = drawn()
    targets[1, 1] = wrong
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        next_token_loss(logits, targets)


def test_targets_of_another_shape_are_refused_with_both_shapes() -> None:
    logits, targets = drawn()
    with pytest.raises(BadInput, match=r"\(3, 7, 61\), targets \(3, 6\)"):
        next_token_loss(logits, targets[:, 1:])
