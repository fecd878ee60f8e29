"""The sliced loss is F.cross_entropy, its gradient too, and it holds no second copy of the logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoforward.model import footprint
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
    monkeypatch.setitem(subject.SLICE, "cpu", rows * V)
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
    monkeypatch.setitem(subject.SLICE, "cpu", 4 * V)
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


def test_memory_is_planned_with_the_slices_that_are_taken() -> None:
    assert subject.SLICE["cpu"] == footprint.LOSS_SLICE
