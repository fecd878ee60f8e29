"""Attention with a backward of our own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from isoforward.model import attention_kernels
from isoforward.model.attention_kernels import attend_plainly

SHAPE = (3, 2, 24, 16)


def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as views of one tensor, which is how the model has them."""
    B, H, T, D = SHAPE
    qkv = torch.randn(B, T, 3 * H * D, generator=torch.Generator().manual_seed(4)).to(dtype)
    return [each.view(B, T, H, D).transpose(1, 2).detach().requires_grad_() for each in qkv.split(H * D, dim=-1)]


def gradients(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = leaves(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    inputs = [each.detach().to(dtype).requires_grad_() for each in inputs]
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).to(dtype)
    return list(torch.autograd.grad(attend(*inputs, is_causal=True), inputs, gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_forward_is_the_fused_one_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = leaves(dtype)
    q, k, v = inputs
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(attend_plainly(*inputs, is_causal=True), fused)
    with torch.inference_mode():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), fused)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_its_gradients_are_those_of_attention_in_double_precision(dtype: torch.dtype, tolerance: float) -> None:
    for found, exact in zip(
        gradients(attend_plainly, dtype), gradients(F.scaled_dot_product_attention, torch.float64), strict=True
    ):
        assert found.dtype == dtype
        bound = tolerance * float(exact.abs().max())
        torch.testing.assert_close(found.double(), exact, atol=bound, rtol=0)


def test_a_backward_that_looks_ahead_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "tril_", lambda self: self)
    with pytest.raises(AssertionError):
        test_its_gradients_are_those_of_attention_in_double_precision(torch.float32, 1e-5)


@pytest.mark.parametrize(
    "how",
    [{"is_causal": False}, {"is_causal": True, "dropout_p": 0.5}, {"attn_mask": torch.ones(24, 24, dtype=torch.bool)}],
)
def test_what_has_no_plain_backward_is_asked_of_torch(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels.PlainBackward, "apply", lambda *_: pytest.fail("the plain one was asked"))
    assert attend_plainly(*leaves(torch.float32), **how).shape == SHAPE
