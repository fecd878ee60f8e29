"""One kernel at a time: what is planted in one of them is named, and exact decoding has nothing to name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.formats.export import freeze
from isoforward.measure import culprits as culprits_module
from isoforward.measure import mismatch
from isoforward.measure.culprits import REST, culprits, ladder
from isoforward.model import kernels
from isoforward.model.gpt import GPT
from isoforward.model.kernels import shapes
from isoforward.serve import decoding
from isoforward.serve.exact import fewest_rows
from tests.conftest import SHAPES, lively, tiny

LOW = torch.bfloat16
ROWS = 4


def texts_of(seed: int, count: int = 2, length: int = 16) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(61, (count, length), generator=generator).tolist()


# A machine on which the order of a sum shows in no bit: sums are taken in fp64, and rounded once

linear, attend = F.linear, F.scaled_dot_product_attention
Plant = Callable[[pytest.MonkeyPatch, int], None]


def summed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return attend(q.double(), k.double(), v.double(), **how).to(q.dtype)


@pytest.fixture
def in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear", summed)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attended)
    monkeypatch.setattr(kernels, "packed", lambda weight: lambda x, _, bias: summed(x, weight, bias))


# What is planted in one kernel of serving there


def up(y: Tensor, seed: int) -> Tensor:
    """The next number up, in one column."""
    column = seed % y.shape[-1]
    raised = y.clone()
    raised[..., column] = torch.nextafter(y[..., column], torch.tensor(float("inf"), dtype=y.dtype))
    return raised


def in_products(monkeypatch: pytest.MonkeyPatch, seed: int, *, head: bool = False) -> None:
    def planted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = summed(x, weight, bias)
        return up(y, seed) if x.numel() == x.shape[-1] and (len(weight) == 61) is head else y

    monkeypatch.setattr(F, "linear", planted)


def in_head(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    in_products(monkeypatch, seed, head=True)


def in_attention(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def planted(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        y = attended(q, k, v, **how)
        return up(y, seed) if q.shape[2] == 1 else y

    monkeypatch.setattr(F, "scaled_dot_product_attention", planted)


def in_packed_weights(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(kernels, "packed", lambda weight: lambda x, _, bias: up(summed(x, weight, bias), seed))


def in_norms(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    for name in ("layer_norm", "rms_norm"):
        normed = getattr(F, name)

        def planted(x: Tensor, *others: Any, normed: Callable[..., Tensor] = normed) -> Tensor:
            y = normed(x, *others)
            return up(y, seed) if x.shape[1] == 1 else y

        monkeypatch.setattr(F, name, planted)


def in_casts(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def planted(model: GPT) -> GPT:
        frozen = freeze(model)
        weight = frozen.blocks[seed % 2].get_submodule("attention.qkv").get_parameter("weight")
        weight.copy_(up(weight, seed))
        return frozen

    for module in (culprits_module, mismatch):
        monkeypatch.setattr(module, "freeze", planted)


def in_cache(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    room_for = decoding.room_for
    monkeypatch.setattr(culprits_module, "room_for", lambda model, **how: room_for(freeze(model, dtype=LOW), **how))


PLANTS: dict[str, Plant] = {
    "products": in_products,
    "head": in_head,
    "attention": in_attention,
    "chosen products": in_packed_weights,
    "norms": in_norms,
    "casts": in_casts,
    "cache dtype": in_cache,
}


def named(seed: int) -> list[str]:
    torch.manual_seed(seed)
    master = lively(GPT(tiny(family="llama" if seed % 2 else "gpt2")))
    packed = {(1, *shape): "packed" for shape in shapes(master.config)}
    return culprits(ladder(master, ROWS, packed, texts_of(seed)))


@pytest.mark.usefixtures("in_any_order")
def test_nothing_is_named_where_every_kernel_is_trainings() -> None:
    assert named(1) == named(2) == []


@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize("kernel", PLANTS)
def test_the_kernel_that_one_ulp_is_planted_in_is_named(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS[kernel](monkeypatch, 3)
    assert named(3) == [kernel]


@pytest.mark.slow
@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize("kernel", PLANTS)
def test_each_kernel_is_named_in_at_least_19_of_20_tries(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = 0
    for seed in range(20):
        with monkeypatch.context() as patch:
            PLANTS[kernel](patch, seed)
            right += named(seed) == [kernel]
    assert right >= 19


def test_all_else_is_named_where_none_of_its_parts_is() -> None:
    assert culprits({REST: 1e-7, "products": 2e-7, "norms": 0.0}) == ["products", REST]


# This machine's own kernels


def test_usual_serving_differs_by_products_and_attention_and_by_nothing_else() -> None:
    master = lively(GPT(tiny()))
    found = ladder(master, fewest_rows(master.config, master.dtype), {}, texts_of(2, count=1, length=20))
    assert found[REST] == 0
    assert set(culprits(found)) >= {"products", "attention"}
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norms_casts_and_the_dtype_of_a_cache_move_nothing(shape: dict[str, Any], dtype: torch.dtype) -> None:
    master = lively(GPT(tiny(**shape), dtype=dtype))
    found = ladder(master, fewest_rows(master.config, dtype), {}, texts_of(5, count=1))
    assert {name: found[name] for name in (REST, "casts", "norms", "cache dtype")} == {
        REST: 0,
        "casts": 0,
        "norms": 0,
        "cache dtype": 0,
    }
