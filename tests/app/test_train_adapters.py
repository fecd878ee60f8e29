"""Adapters through `python train.py`'s own code: real Lightning, a tiny model, synthetic tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from isoforward.app.train import train
from isoforward.base.config import (
    AdapterConfig,
    DataConfig,
    MeasureConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
    TrainerConfig,
)
from isoforward.base.errors import BadInput, Integrity
from isoforward.formats import checkpoint_file
from isoforward.formats.export import fingerprint
from isoforward.formats.loading import load_trainable
from isoforward.model.adapters import hold_in_int8, is_low_rank
from isoforward.serve.inference import InferenceModule, load
from isoforward.train import stopping
from isoforward.train.stopping import refuse_another

LORA = AdapterConfig(name="lora", rank=4, targets=["q", "v", "down"])


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(family="llama", layers=1, heads=2, width=16, context=16),
        data=DataConfig(source="synthetic", tokenizer="char", batch=4, length=8),
        trainer=TrainerConfig(max_steps=4, validate_every=2, checkpoint_every=2, accelerator="cpu", progress=False),
        measure=MeasureConfig(enabled=False),
        tracking=TrackingConfig(mode="none"),
        sample_prompt="a",
        precision="fp32",
        run_dir=str(tmp_path / "base"),
    )


@pytest.fixture
def on_base(config: TrainConfig) -> TrainConfig:
    """A LoRA training on the export of a trained base."""
    train(config)
    model = ModelConfig(source="hf", path=f"{config.run_dir}/export")
    return replace(config, model=model, adapter=LORA, run_dir=f"{config.run_dir}_lora")


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    (last,) = Path(run_dir, "checkpoints").glob("last-*.ckpt")
    state: dict[str, torch.Tensor] = checkpoint_file.load(last)["state_dict"]
    return state


def text(module: InferenceModule) -> str:
    return str(module.generate("a", temperature=0, max_new_tokens=8))


@pytest.fixture(params=["full", "int8"])
def on_either_base(on_base: TrainConfig, request: pytest.FixtureRequest) -> TrainConfig:
    return replace(on_base, adapter=replace(LORA, base=request.param))


def test_an_imported_base_stays_what_it_was_and_the_adapter_is_served_merged_beside_it_and_from_a_checkpoint(
    on_either_base: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(on_either_base)
    told = capsys.readouterr().out
    assert "of them trained in fp32" in told and "its adapter is merged there, which moved logits by" in told
    base = load_trainable(Path(str(on_either_base.model.path)))
    if on_either_base.adapter.base == "int8":
        hold_in_int8(base)
    for name, tensor in weights(on_either_base.run_dir).items():
        own = name.removeprefix("model.")
        assert is_low_rank(own) or torch.equal(tensor, base.get_parameter(own))
    run, base_export = Path(on_either_base.run_dir), str(on_either_base.model.path)
    beside = load(base_export, lora=run / "adapter", kernels="reference")
    (last,) = (run / "checkpoints").glob("last-*.ckpt")
    tokens = torch.arange(8)[None] % 20
    assert torch.equal(beside(tokens), load(last, kernels="reference")(tokens))
    assert not torch.equal(beside(tokens), load(base_export, kernels="reference")(tokens))
    torch.testing.assert_close(beside(tokens), load(run, kernels="reference")(tokens), atol=1e-5, rtol=1e-4)
    assert torch.equal(beside(tokens), load(base_export, lora=run, kernels="reference")(tokens))  # a run's own
    with pytest.raises(Integrity, match=r"belongs to another base.*merged already: leave out lora=") as refusal:
        load(run, lora=run / "adapter")
    assert "sha" not in str(refusal.value) and len(str(refusal.value)) < 400
    with pytest.raises(BadInput, match=r"lora=.*/nowhere does not exist"):
        load(base_export, lora=run / "nowhere")


def test_a_run_on_a_checkpoint_writes_down_the_sizes_that_it_trained(on_base: TrainConfig) -> None:
    train(on_base)
    base, tuned = (
        stopping.read_yaml(Path(path, "config.yaml")) for path in (f"{on_base.run_dir[:-5]}", on_base.run_dir)
    )
    for key in ("family", "layers", "heads", "width", "context"):
        assert tuned["model"][key] == base["model"][key]  # type: ignore[index]
    assert tuned["model"]["layers"] != on_base.model.layers  # type: ignore[index]
    assert tuned["data"]["tokenizer"] == on_base.model.path  # type: ignore[index]
    refuse_another(on_base)  # it goes on when it is typed again


def test_transformers_opens_the_merged_export(on_base: TrainConfig) -> None:
    transformers = pytest.importorskip("transformers")
    train(on_base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{on_base.run_dir}/export")
    tokens = torch.arange(8)[None] % 20
    ours = load(on_base.run_dir, kernels="reference")(tokens)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-5, rtol=1e-4)


def test_a_resumed_adapter_ends_at_the_same_bits(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_all(trainer: Trainer, directory: Path, name: str) -> None:
        trainer.save_checkpoint(directory / f"{name}-{trainer.global_step:06d}.ckpt")

    monkeypatch.setattr(stopping, "keep", keep_all)
    whole = replace(config, adapter=LORA)
    train(whole)
    checkpoints = Path(config.run_dir, "checkpoints")
    first = checkpoint_file.load(checkpoints / "last-000004.ckpt")["state_dict"]
    halfway = str(checkpoints / "last-000002.ckpt")
    train(replace(whole, trainer=replace(config.trainer, resume=halfway)))
    second = checkpoint_file.load(checkpoints / "last-000004.ckpt")["state_dict"]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    before = checkpoint_file.load(Path(halfway))["state_dict"]
    assert not all(torch.equal(tensor, before[name]) for name, tensor in first.items())


def test_a_run_with_an_adapter_does_not_go_on_without(config: TrainConfig) -> None:
    train(replace(config, adapter=LORA))
    with pytest.raises(BadInput, match=r"adapter\.name=none \(began with lora\)"):
        refuse_another(config)


@pytest.mark.parametrize("key", ["accumulate", pytest.param("devices", marks=pytest.mark.slow)])
def test_a_batch_in_two_halves_is_one_batch(config: TrainConfig, key: str) -> None:
    found = []
    for halves in (1, 2):
        run_dir = f"{config.run_dir}_{halves}"
        shared: dict[str, Any] = {key: halves}
        plan = replace(config.trainer, max_steps=2, **shared)
        train(replace(config, adapter=LORA, trainer=plan, run_dir=run_dir))
        found.append(weights(run_dir))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-5, rtol=1e-4)


def test_a_head_trained_alone_is_exported_as_its_own(config: TrainConfig) -> None:
    train(replace(config, adapter=AdapterConfig(name="frozen")))
    model = load_trainable(Path(config.run_dir, "export"))
    assert not model.config.tied and not torch.equal(model.embedding.weight, model.unembedding.weight)
    assert fingerprint(model)
    assert not Path(config.run_dir, "adapter").exists()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (AdapterConfig(name="lora", rank=17), "above the width of q"),
        (AdapterConfig(name="lora", targets=["query"]), "'query' matches nothing"),
        (AdapterConfig(name="frozen", targets=["blocks.7"]), "did you mean blocks.0"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_is_written(
    config: TrainConfig, adapter: AdapterConfig, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        train(replace(config, adapter=adapter))
    assert not Path(config.run_dir).exists()
