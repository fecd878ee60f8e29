"""An adapter on disk: what we read again, what PEFT makes of it, and what is refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import sha256_of
from isoforward.formats.adapter_format import CONFIG, WEIGHTS, add_adapter, save_adapter
from isoforward.formats.export import digest_of, export, freeze, without_adapter
from isoforward.model.adapters import AdaptedLinear, adapt, linears_of
from isoforward.model.gpt import GPT
from tests.conftest import lively, tiny

TARGETS: list[list[str]] = [[], ["q", "v"], ["k", "down"]]


def adapted(config: ModelConfig, targets: list[str]) -> GPT:
    torch.manual_seed(3)
    return lively(adapt(lively(GPT(config)), AdapterConfig(name="lora", rank=4, alpha=6.0, targets=targets)))


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_an_adapter_is_read_again_to_the_bit(
    config: ModelConfig, targets: list[str], tokens: Tensor, tmp_path: Path
) -> None:
    model = adapted(config, targets)
    save_adapter(model, tmp_path / "adapter")
    read = add_adapter(freeze(without_adapter(model)), tmp_path / "adapter")
    assert torch.equal(read(tokens), freeze(model)(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_over_int8_is_read_again_beside_the_weights_before_rounding(
    tokens: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    base = lively(GPT(tiny(), dtype=dtype))
    served = freeze(base)
    over_int8 = AdapterConfig(name="lora", rank=4, targets=["q", "down"], base="int8")
    model = adapt(base, over_int8)
    with torch.no_grad():
        for _, layer in linears_of(model, AdaptedLinear):
            for beside in layer.pairs().values():
                beside.b.normal_(std=0.1)  # nothing but what training would change
    save_adapter(model, tmp_path / "adapter")
    read = add_adapter(served, tmp_path / "adapter")
    assert torch.equal(read(tokens), freeze(model)(tokens))
    other = freeze(lively(GPT(tiny(), dtype=dtype)))
    with torch.no_grad():
        other.embedding.weight[0, 0] += 1
    with pytest.raises(Integrity, match="belongs to another base"):
        add_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_peft_opens_it_on_the_export_of_its_base(
    shape: str, targets: list[str], tokens: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = adapted(tiny(family=shape), targets)
    export(without_adapter(model), tmp_path / "base", tokenizer=None)
    save_adapter(model, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings(action="error", category=UserWarning):  # of keys that are missing or not used
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(tokens).logits, model(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_its_names_and_ranks_are_those_that_peft_writes(family: str, tmp_path: Path) -> None:
    """PEFT's checkpoint format: base_model.model.NAME.lora_A.weight (r, in), lora_B (out, r)."""
    save_adapter(adapted(tiny(family=family), ["q", "v"]), tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / CONFIG).read_text())

    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items()}
    if family == "gpt2":
        place = "base_model.model.transformer.h.1.attn.c_attn"
        assert shapes[f"{place}.lora_A.weight"] == (8, 32) and shapes[f"{place}.lora_B.weight"] == (96, 8)
        assert (said["r"], said["rank_pattern"]) == (4, {"attn.c_attn": 8})
        assert said["alpha_pattern"] == {"attn.c_attn": 12.0} and said["fan_in_fan_out"]
    else:
        place = "base_model.model.model.layers.1.self_attn.v_proj"
        assert shapes[f"{place}.lora_A.weight"] == (4, 32) and shapes[f"{place}.lora_B.weight"] == (32, 4)
        assert (said["r"], said["lora_alpha"], said["rank_pattern"]) == (4, 6.0, {})
    assert len(shapes) == (4 if family == "gpt2" else 8)


def test_an_adapter_of_another_base_is_refused_by_its_hash(tmp_path: Path) -> None:
    model = adapted(tiny(), ["q"])
    save_adapter(model, tmp_path / "adapter")
    other = without_adapter(model)
    with torch.no_grad():
        other.embedding.weight[0, 0] += 1
    with pytest.raises(Integrity, match="belongs to another base"):
        add_adapter(freeze(other), tmp_path / "adapter")
    assert not list(linears_of(other, AdaptedLinear))


def test_a_damaged_adapter_and_what_is_none_are_refused(tmp_path: Path) -> None:
    model = adapted(tiny(), ["q"])
    base = freeze(without_adapter(model))
    directory = save_adapter(model, tmp_path / "adapter")
    with (directory / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(Integrity, match="damaged or changed"):
        add_adapter(base, directory)
    export(without_adapter(model), tmp_path / "export", tokenizer=None)
    with pytest.raises(BadInput, match="is an export, not an adapter"):
        add_adapter(base, tmp_path / "export")
    with pytest.raises(BadInput, match="holds no adapter"):
        add_adapter(base, tmp_path)


def test_an_adapter_of_other_shapes_than_it_claims_is_refused(tmp_path: Path) -> None:
    """Vouched for by its own digests, and small enough to be spread over the real shape unnoticed."""
    model = adapted(tiny(), ["q"])
    directory = save_adapter(model, tmp_path / "adapter")
    held = {name: tensor[:, :1].contiguous() for name, tensor in load_file(directory / WEIGHTS).items()}
    save_file(held, directory / WEIGHTS)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][WEIGHTS] = sha256_of(directory / WEIGHTS)
    (directory / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
    with pytest.raises(Integrity, match="does not fit its model"):
        add_adapter(freeze(without_adapter(model)), directory)
