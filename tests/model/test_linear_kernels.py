"""Whatever library multiplies, the product and its gradients are those of a linear layer in double precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from isoforward.formats.export import freeze
from isoforward.model import linear_kernels as subject
from isoforward.model.gpt import GPT
from isoforward.model.linear_kernels import A_ROW, FEW, LARGE, few_rows, padded
from tests.conftest import tiny

LAYERS = {"small": (24, 40), "large": (LARGE // 512, 512)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"])
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether MKL is left out where the weight is large."""
    if request.param and not torch._C._has_mkldnn:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(subject, "mkl_reads_alone", lambda: request.param)
    return request.param


def layer(size: str, dtype: torch.dtype, rows: tuple[int, ...]) -> list[torch.Tensor]:
    """Input, weight and bias; results of about one."""
    generator = torch.Generator().manual_seed(3)
    out, width = LAYERS[size]
    shapes = ((*rows, width), (out, width), (out,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [each.to(dtype) for each in (x, weight / width**0.5, bias)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (FEW, 1), (1, 5), (1,)])
@pytest.mark.parametrize("size", LAYERS)
def test_it_is_the_product_of_a_linear_layer(alone: bool, size: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = layer(size, dtype, rows)
    for shift in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
        found = few_rows(x, weight, shift)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [(1, 1), (3, 2)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", LAYERS)
def test_its_gradients_are_those_of_a_linear_layer(
    alone: bool, size: str, with_bias: bool, rows: tuple[int, ...]
) -> None:
    def gradients(product: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.to(dtype).requires_grad_() for each in layer(size, torch.float32, rows)][: 2 + with_bias]
        product(*leaves, *[None] * (not with_bias)).square().sum().backward()
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    for found, exact in zip(gradients(few_rows, torch.float32), gradients(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)


def test_training_and_serving_get_the_same_bits(alone: bool) -> None:
    x, weight, bias = layer("large", torch.float32, (2, 1))
    trained = few_rows(x, weight.requires_grad_(), bias)
    with torch.inference_mode():
        assert torch.equal(few_rows(x, weight, bias), trained)


def test_onednn_multiplies_where_the_weight_is_large_enough_for_its_rows(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    product = subject.onednn
    monkeypatch.setattr(
        subject, "onednn", lambda *layer: asked.append((layer[1].shape, len(layer[0]))) or product(*layer)
    )
    enough = LARGE // A_ROW  # rows
    with torch.inference_mode():
        for size in LAYERS:
            for rows in (1, enough, enough + 1):
                few_rows(*layer(size, torch.float32, (rows, 1)))
                few_rows(*layer(size, torch.bfloat16, (rows, 1)))
    assert asked == [(LAYERS["large"], rows) for rows in (1, enough)] * alone


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_padded_product_is_the_same_and_its_gradients_are(with_bias: bool) -> None:
    def results(product: Callable[..., torch.Tensor]) -> list[torch.Tensor | None]:
        x, weight, bias = (each.requires_grad_() for each in layer("small", torch.float64, (3, 5)))
        y = product(x, weight, bias if with_bias else None)
        y.square().sum().backward()
        return [y, x.grad, weight.grad, *([bias.grad] if with_bias else [])]

    for found, exact in zip(results(padded), results(F.linear), strict=True):
        torch.testing.assert_close(found, exact)


@pytest.mark.gpu
def test_a_head_of_odd_size_gives_the_same_logits_and_bits_in_both_lives() -> None:
    model = GPT(tiny(vocab=50257), dtype=torch.bfloat16).to("cuda")
    tokens = torch.randint(50257, (8, 32), device="cuda")
    trained = model(tokens)
    assert trained.stride(1) % 8 == 0
    with torch.inference_mode():
        assert torch.equal(trained, freeze(model)(tokens))
        exact = F.linear(model.trunk(tokens).double(), model.unembedding.weight.double())
    torch.testing.assert_close(trained.double(), exact, atol=2e-2, rtol=2e-2)
