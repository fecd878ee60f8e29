"""Whatever kernel multiplies, the product is a linear layer's; another than F.linear is used where it was chosen."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.base.device import CpuDevice
from isoforward.formats.export import freeze
from isoforward.measure import flops
from isoforward.measure.case import Case, frozen_of, master_of, with_kernels
from isoforward.measure.flops import FlopCounter, Scope
from isoforward.model import kernels as subject
from isoforward.model.attention_kernels import attend_plainly
from isoforward.model.gpt import GPT, KVCache, Linear
from isoforward.model.kernels import (
    ROWS,
    at_rows,
    backward_of,
    candidates,
    kernels_of,
    padded,
    product_of,
    shapes,
    use_backward,
    use_kernels,
)
from isoforward.model.steps import decode, prefill
from tests.conftest import lively, tiny

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer(rows: tuple[int, ...], dtype: torch.dtype, out: int = 24, width: int = 40) -> list[Tensor]:
    """Input, weight and bias; results of about one."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((*rows, width), (out, width), (out,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [each.to(dtype) for each in (x, weight / width**0.5, bias)]


def all_of(config: Any, name: str) -> dict[tuple[int, int, int], str]:
    return {(rows, *shape): name for rows in ROWS for shape in shapes(config) if rows == 1 or name in ANY_ROWS}


ONE_ROW = candidates(1, copies=True)
ANY_ROWS = candidates(4, copies=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(1, 1), (1,), (3, 1), (64, 1), (5,)])
@pytest.mark.parametrize("name", ONE_ROW)
def test_every_kernel_gives_the_product_of_a_linear_layer(name: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    if name not in candidates(rows[0], copies=True):
        pytest.skip("for one row alone")
    x, weight, bias = layer(rows, dtype)
    with torch.inference_mode():
        for shift in (bias, None):
            exact = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
            found = product_of(name, weight)(x, weight, shift)
            assert (found.dtype, found.shape) == (dtype, exact.shape)
            torch.testing.assert_close(found.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rows_between_two_measured_numbers_are_as_the_larger() -> None:
    assert [at_rows(rows) for rows in (1, 2, 4, 5, 16, 17, 64, 65)] == [1, 4, 4, 16, 16, 64, 64, 0]


def test_the_shapes_are_those_of_the_model(config: Any) -> None:
    with torch.device("meta"):
        model = GPT(config)
    layers = [tuple(each.weight.shape) for each in model.modules() if isinstance(each, Linear)]
    assert set(shapes(config)) == set(layers)
    assert subject.training_products(config, 7)[-1] == (1, 7, config.vocab, config.width)
    assert sum(count for count, *_ in subject.training_products(config, 7)) == len(layers)


def test_a_real_measurement_times_every_candidate() -> None:
    ways = subject.timed_products(ONE_ROW, 1, 8, 2**20, torch.float32)
    assert list(ways) == ONE_ROW
    assert all(way() > 0 for way in ways.values())
    assert all(way() > 0 for way in subject.timed_backwards((1, 2, 8, 4)).values())


def planted(monkeypatch: pytest.MonkeyPatch, **times_s: float) -> None:
    def timed(names: list[str], *_: object) -> dict[str, Callable[[], float]]:
        return {name: partial(times_s.get, name, 1.0) for name in names}

    monkeypatch.setattr(subject, "timed_products", timed)


def test_a_kernel_is_chosen_for_each_shape_that_a_decode_has(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, mv=0.5, onednn=0.8, packed=0.7)
    found = kernels_of(tiny(), torch.float32, CPU, (1, 3))
    assert found == {(rows, *shape): name for rows, name in ((1, "mv"), (4, "packed")) for shape in shapes(tiny())}
    assert kernels_of(tiny(), torch.float32, torch.device("cuda"), (1,)) == {}
    assert kernels_of(tiny(), torch.float32, CPU, (65,)) == {}
    monkeypatch.setenv("ISOFORWARD_KERNELS", "reference")
    assert kernels_of(tiny(), torch.float32, CPU, (1, 3)) == {}


def test_no_copies_are_packed_where_memory_is_short(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, packed=0.1, onednn=0.5)
    held = sum(parameter.numel() for parameter in GPT(tiny()).parameters()) * 4
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda device: 2 * held)
    assert set(kernels_of(tiny(), torch.float32, CPU, (4,)).values()) == {"onednn"}


@pytest.mark.parametrize("name", ONE_ROW)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_gives_the_same_numbers_by_any_kernel(
    name: str, dtype: torch.dtype, config: Any, tokens: Tensor
) -> None:
    model = lively(GPT(config, dtype=dtype))
    plain, other = freeze(model), freeze(model)
    use_kernels(other, all_of(config, name))

    def logits(of: GPT, rows: int) -> Tensor:
        cache = KVCache(config, batch=rows, capacity=8, dtype=dtype)
        return torch.stack([prefill(of, tokens[:rows, :5], cache), decode(of, tokens[:rows, 5:6], cache)])

    for rows in (1, 3):
        torch.testing.assert_close(logits(other, rows), logits(plain, rows), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ONE_ROW)
def test_both_lives_keep_the_same_bits_whatever_decode_uses(name: str, config: Any, tokens: Tensor) -> None:
    model = lively(GPT(config))
    frozen = freeze(model)
    use_kernels(frozen, all_of(config, name))
    for few in (tokens, tokens[:1, :2]):
        with torch.inference_mode():
            assert torch.equal(frozen(few), model(few).detach())


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_decode_that_ran_counts_what_the_meta_device_counts(name: str) -> None:
    """It does not where the counter knows none of the operators that other kernels dispatch."""
    config = tiny()
    frozen = freeze(GPT(config))
    use_kernels(frozen, all_of(config, name))
    used: set[str] = set()

    class Noting(FlopCounter):
        def count(self, operator: Any, args: Any) -> int:
            used.add(str(operator).removesuffix(".default"))
            return super().count(operator, args)

    for batch in (1, 3):
        cache = KVCache(config, batch=batch, capacity=8, dtype=torch.float32)
        prefill(frozen, torch.zeros(batch, 7, dtype=torch.long), cache)
        with Noting(Scope({})) as counter:
            decode(frozen, torch.zeros(batch, 1, dtype=torch.long), cache)
        assert sum(counter.flops.values()) == flops.count_decode(config, batch=batch, cached=7)
    operators = {"mv": "aten.mv", "addmv": "aten.addmv", "linear": "aten.addmm"}
    assert operators.get(name, "mkldnn._linear_pointwise") in used


def test_the_rows_name_the_kernels(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, packed=0.5)
    case = with_kernels(Case(experiment="planted", model=tiny()), rows=(1, 64))
    assert case.decoding()["kernels"] == case.at_context(8, cache=True)["kernels"] == "packed"
    assert case.decode_kernels(64) == {"kernels": "packed"}
    assert case.decode_kernels(16) == {}
    for other in (
        case.training(),
        case.prefilling(),
        case.at_context(8, cache=False),
        replace(case, compile=True).decoding(),
    ):
        assert "kernels" not in other
    layers = [each for each in frozen_of(case, master_of(case)).modules() if isinstance(each, Linear)]
    assert all(set(each.few_rows) == {1, 64} for each in layers)
    monkeypatch.setenv("ISOFORWARD_KERNELS", "reference")
    assert "kernels" not in with_kernels(replace(case, kernels={})).decoding()


@pytest.mark.parametrize(("plain_s", "chosen"), [(0.5, "plain"), (0.95, "fused"), (2.0, "fused")])
def test_the_quicker_backward_is_taken(
    quiet: None, monkeypatch: pytest.MonkeyPatch, plain_s: float, chosen: str
) -> None:
    times = {"fused": lambda: 1.0, "plain": lambda: plain_s}
    monkeypatch.setattr(subject, "timed_backwards", lambda shape: times)
    model = lively(GPT(tiny(), dtype=torch.bfloat16))
    use_backward(model, backward_of(model.config, torch.bfloat16, CPU, batch=2, length=16))
    plain = [block.get_submodule("attention").attend is attend_plainly for block in model.blocks]
    assert plain == [chosen == "plain"] * 2
    monkeypatch.setattr(subject, "timed_backwards", lambda shape: pytest.fail("measured twice"))
    assert backward_of(model.config, torch.bfloat16, CPU, batch=2, length=16) == chosen
    monkeypatch.setenv("ISOFORWARD_KERNELS", "reference")
    assert backward_of(model.config, torch.bfloat16, CPU, batch=2, length=16) == "fused"


def test_no_backward_is_measured_where_the_fused_one_is_known_to_be_better_or_the_only_one(
    quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "timed_backwards", lambda shape: pytest.fail("measured"))
    for config, dtype, device in (
        (tiny(), torch.float32, CPU),
        (tiny(), torch.bfloat16, torch.device("cuda")),
        (tiny(dropout=0.1), torch.bfloat16, CPU),
        (tiny(family="llama", kv_heads=2), torch.bfloat16, CPU),
    ):
        assert backward_of(config, dtype, device, batch=2, length=16) == "fused"


def test_both_lives_keep_the_same_bits_and_the_rows_say_which_backward_it_was(
    quiet: None, monkeypatch: pytest.MonkeyPatch, tokens: Tensor
) -> None:
    monkeypatch.setattr(subject, "timed_backwards", lambda shape: {"fused": lambda: 1.0, "plain": lambda: 0.5})
    planted(monkeypatch)
    case = with_kernels(Case(experiment="planted", model=tiny(), precision="bf16", batch=3, length=20))
    assert case.training()["attention_backward"] == "plain"
    model = lively(master_of(case))
    logits = model(tokens)
    with torch.inference_mode():
        assert torch.equal(freeze(model)(tokens), logits)
    assert logits.grad_fn is not None
    assert "attention_backward" not in with_kernels(replace(case, precision="fp32")).training()


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_padded_product_is_the_same_and_its_gradients_are(with_bias: bool) -> None:
    def results(product: Callable[..., Tensor]) -> list[Tensor | None]:
        x, weight, bias = (each.requires_grad_() for each in layer((3, 5), torch.float64))
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
