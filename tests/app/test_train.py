"""What a run does beyond its losses, in this process: real Lightning, a tiny model, synthetic tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isoforward.app import train as app
from isoforward.app.train import train
from isoforward.base.config import DataConfig, MeasureConfig, ModelConfig, OptimConfig, TrackingConfig, TrainConfig
from isoforward.base.config import TrainerConfig as Plan
from isoforward.base.device import CudaDevice
from isoforward.base.errors import BadInput, Integrity
from isoforward.formats import checkpoint_file
from isoforward.formats.checkpoint_file import load as state_of
from isoforward.serve.inference import load


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(layers=1, heads=2, width=16, context=16),
        data=DataConfig(source="synthetic", tokenizer="char", batch=4, length=8),
        trainer=Plan(max_steps=6, validate_every=2, validation_batches=1, accelerator="cpu", progress=False),
        measure=MeasureConfig(enabled=False),
        tracking=TrackingConfig(mode="none"),
        sample_prompt="a",
        precision="fp32",
        run_dir=str(tmp_path / "run"),
    )


def planned(config: TrainConfig, **plan: object) -> TrainConfig:
    return replace(config, trainer=replace(config.trainer, **plan))


def steps_of(config: TrainConfig) -> list[int]:
    return [state_of(path)["global_step"] for path in Path(config.run_dir, "checkpoints").glob("last-*.ckpt")]


def test_the_profiler_writes_a_trace_that_a_browser_opens(config):
    train(planned(config, profiler="pytorch"))
    events = json.loads(Path(config.run_dir, "trace.json").read_text())["traceEvents"]
    assert {"aten::mm", "aten::embedding"} <= {event.get("name") for event in events}


def test_training_that_learns_nothing_stops_early(config):
    train(replace(planned(config, early_stopping=1, max_steps=20), optim=OptimConfig(lr=0.0)))
    assert steps_of(config) == [4]  # the second validation was no better than the first


def test_training_stops_when_its_time_is_up(config):
    train(planned(config, max_time="00:00:00:01", max_steps=10**6, validate_every=10**6))
    assert 0 < steps_of(config)[0] < 10**6


def test_a_model_trained_on_a_gpu_is_measured_there(config, monkeypatch):
    """Though Lightning has moved the module back to the CPU by then."""
    measured = []
    monkeypatch.setattr(app, "best_device", lambda accelerator: CudaDevice(torch.device("cuda")))
    monkeypatch.setattr(app, "refuse_beyond_memory", lambda config, model: None)
    monkeypatch.setattr(app, "measure_both_lives", lambda case, *_: measured.append(case.device))
    monkeypatch.setattr(app, "describe", lambda *_: None)
    monkeypatch.setattr(app, "conclude", lambda *_, **__: None)
    train(replace(config, measure=MeasureConfig()))
    assert measured == ["cuda"]


def of_other_shapes(state: Any) -> Any:
    """The same, but that every matrix has a row more."""
    if isinstance(state, torch.Tensor):
        return torch.cat([state, state[:1]]) if state.dim() == 2 else state
    if isinstance(state, dict):
        return {key: of_other_shapes(value) for key, value in state.items()}
    return [of_other_shapes(each) for each in state] if isinstance(state, list) else state


def test_a_whole_checkpoint_of_no_such_training_is_refused_by_name(config):
    config = planned(config, max_time="00:00:00:01", max_steps=10**6, validate_every=10**6)
    train(config)
    (path,) = Path(config.run_dir, "checkpoints").glob("last-*.ckpt")
    good = state_of(path)
    for key in ("global_step", "state_dict", "optimizer_states", "loops"):
        less = {name: value for name, value in good.items() if name != key}
        hostile = [less, less | {key: "text"}]
        if key.endswith(("dict", "states")):
            hostile.append(less | {key: of_other_shapes(good[key])})
        for state in hostile:
            checkpoint_file.save(path, state)
            with pytest.raises(Integrity, match=rf"{path.name} is whole, but this training cannot go on"):
                train(planned(config, resume=str(path), max_time="00:00:00:20"))


def test_dropout_is_no_excuse_for_other_logits(config):
    train(replace(config, model=replace(config.model, dropout=0.5)))
    assert load(Path(config.run_dir)).model.config.dropout == 0.5


def test_micro_batches_change_rounding_alone(config, tmp_path):
    train(config)
    train(replace(planned(config, accumulate=4), run_dir=str(tmp_path / "cut")))
    whole, cut = (load(Path(path)).model.state_dict() for path in (config.run_dir, tmp_path / "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
def test_an_accelerator_that_is_not_there_is_refused_before_anything_is_written(config):
    with pytest.raises(BadInput, match=r"trainer\.accelerator=gpu: no CUDA device"):
        train(planned(config, accelerator="gpu"))
    assert not Path(config.run_dir).exists()


@pytest.mark.slow
def test_compiled_training_learns_the_same_and_exports_the_forward_that_was_not_compiled(config, tmp_path):
    train(config)
    train(replace(config, compile=True, run_dir=str(tmp_path / "compiled")))
    eager, compiled = (load(Path(path)) for path in (config.run_dir, tmp_path / "compiled"))
    for name, tensor in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=0, atol=1e-4)
    assert compiled.generate("a", max_new_tokens=3, temperature=0)
