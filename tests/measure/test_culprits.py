"""One kernel at a time: what is planted in one of them is named, and exact decoding has nothing to name."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoforward.formats.export import freeze
from isoforward.measure import culprits as culprits_module
from isoforward.measure.culprits import (
    REST,
    Swap,
    culprits,
    differing,
    exact_cache,
    linears,
    shares,
    shares_of_the_rest,
    usual_cache,
    usual_kernels,
)
from isoforward.model.gpt import GPT
from isoforward.serve import decoding
from isoforward.serve.exact import use_exact
from tests.conftest import SHAPES, lively, tiny

LOW = torch.bfloat16


@pytest.fixture(scope="module")
def master() -> GPT:
    return lively(GPT(tiny()))


def texts_of(seed: int, count: int = 2, length: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(61, (count, length), generator=generator).tolist()


def one_ulp(modules: Callable[[GPT], list[nn.Module]]) -> Swap:
    """The next number up, in every output of these modules in decode."""

    def up(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        return torch.nextafter(y, torch.full_like(y, float("inf")))

    def plant(model: GPT) -> None:
        for module in modules(model):
            module.register_forward_hook(up)

    return plant


PLANTS = {
    "products": one_ulp(lambda model: list(linears(model.blocks))),
    "head": one_ulp(lambda model: [model.unembedding]),
    "attention": one_ulp(lambda model: [block.get_submodule("attention") for block in model.blocks]),
    "norms": one_ulp(lambda model: [block.get_submodule("mlp_norm") for block in model.blocks]),
    "embedding": one_ulp(lambda model: [block.get_submodule("attention_norm") for block in list(model.blocks)[:1]]),
}


def test_a_change_of_one_ulp_is_named_in_at_least_19_of_20_tries(master: GPT) -> None:
    named = 0
    for seed in range(20):
        planted = random.Random(seed).choice(list(PLANTS))
        swaps: dict[str, Swap] = {name: PLANTS[name] if name == planted else lambda model: None for name in PLANTS}
        named += culprits(shares(master, swaps, texts_of(seed))) == [planted]
    assert named >= 19


def test_nothing_is_named_where_every_kernel_is_trainings(master: GPT) -> None:
    assert culprits(shares(master, dict.fromkeys(PLANTS, lambda model: None), texts_of(1))) == []


def test_usual_serving_differs_by_products_and_attention_and_by_nothing_else(master: GPT) -> None:
    found = shares(master, usual_kernels({}), texts_of(2, count=1))
    assert found[REST] == 0
    assert set(culprits(found)) >= {"products", "attention"}
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norms_casts_and_the_dtype_of_a_cache_move_nothing(shape: dict[str, Any], dtype: torch.dtype) -> None:
    master = lively(GPT(tiny(**shape), dtype=dtype)).train()
    assert shares_of_the_rest(master, texts_of(5)) == {"casts": 0, "norms": 0, "cache dtype": 0}


def other_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    normed = F.rms_norm

    def one_ulp_up(x: Tensor, *others: Any) -> Tensor:
        y = normed(x, *others)
        return torch.nextafter(y, torch.full_like(y, float("inf"))) if x.shape[1] == 1 else y

    monkeypatch.setattr(F, "rms_norm", one_ulp_up)


def lower_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    room_for = decoding.room_for
    monkeypatch.setattr(culprits_module, "room_for", lambda model, **how: room_for(freeze(model, dtype=LOW), **how))


def other_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprits_module, "freeze", lambda model: freeze(freeze(model, dtype=LOW), dtype=model.dtype))


@pytest.mark.parametrize(
    ("plant", "named"), [(other_norms, "norms"), (lower_cache, "cache dtype"), (other_casts, "casts")]
)
def test_a_change_of_one_of_the_rest_is_named(
    plant: Callable[[pytest.MonkeyPatch], None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = lively(GPT(tiny(family="llama")))
    plant(monkeypatch)
    assert culprits(shares_of_the_rest(llama, texts_of(6))) == [named]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_decoding_depends_on_nothing_else_in_the_batch(dtype: torch.dtype) -> None:
    model = freeze(lively(GPT(tiny(), dtype=dtype)))
    use_exact(model)
    found = dict(differing(model, torch.tensor(texts_of(3, count=64)), exact_cache))
    assert found == dict.fromkeys(found, 0)
    assert {"batch 4", "batch 16", "batch 64", "place in the batch", "left padding"} < set(found)


def test_usual_decoding_in_fp32_depends_on_its_batch(master: GPT) -> None:
    found = dict(differing(freeze(master), torch.tensor(texts_of(3, count=64)), usual_cache))
    assert found["batch 64"] > 0
