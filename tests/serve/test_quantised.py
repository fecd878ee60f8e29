from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.model.gpt import GPT, Linear
from isoforward.serve.inference import load
from isoforward.serve.quantised import Int8Linear, quantise, refuse_unquantisable
from tests.conftest import lively, tiny

pytestmark = pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no int8 kernels")


def test_a_product_is_that_of_rounded_weights_and_rounded_activations() -> None:
    """By hand: scales of |w|max / 127 an output; 8 bits over the range of x, 0 in it, or 7 without VNNI."""
    torch.manual_seed(0)
    linear = Linear(48, 20)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(3, 48)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    weight = (linear.weight / scale).round() * scale
    step = (x.max() - x.min()) / (255 if torch.cpu._is_vnni_supported() else 127)
    rounded = (x / step).round() * step
    expected = rounded @ weight.T + linear.bias
    tolerance = float(step) * float(weight.detach().abs().sum(1).max()) * 0.02  # the zero point may be one off
    torch.testing.assert_close(Int8Linear(linear)(x), expected, atol=tolerance, rtol=0)
    assert not torch.equal(Int8Linear(linear)(x), linear(x))


def test_every_matrix_product_is_quantised_and_the_logits_stay_near(config: ModelConfig, tokens: torch.Tensor) -> None:
    model = freeze(lively(GPT(config)))
    exact = model(tokens)
    changed = quantise(model)(tokens)
    assert not any(isinstance(module, Linear) for module in model.modules())
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 4 * config.layers + 1
    error = float((changed - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.06  # a norm behind each sublayer brings out what rounding took from small sums


def test_precision_int8_serves_an_export_in_int8(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_characters(["the quick brown fox jumps over the lazy dog.\n"])
    model = freeze(lively(GPT(tiny(vocab=tokenizer.vocabulary))), dtype=torch.bfloat16)
    export(model, tmp_path / "export", tokenizer=tokenizer)
    module = load(tmp_path / "export", precision="int8")
    assert isinstance(module.model.unembedding, Int8Linear)
    assert len(module.generate("the", max_new_tokens=5)) == 5


def test_int8_is_refused_where_nothing_multiplies_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="precision=int8 is served on the CPU alone, not on cuda"):
        refuse_unquantisable(torch.device("cuda"))
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["none"]))
    with pytest.raises(BadInput, match="precision=int8 needs the int8 kernels for x86"):
        refuse_unquantisable(torch.device("cpu"))
