"""What a run does beyond its losses, in this process: real Lightning, a tiny model, synthetic tokens."""

import errno
import json
import math
from collections.abc import Mapping
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
from isoforward.base.environment import environment
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.results import read, select
from isoforward.base.storage import DONE, TIME_IS_UP
from isoforward.formats import checkpoint_file
from isoforward.formats.checkpoint_file import load as state_of
from isoforward.serve.inference import load
from isoforward.show.wandb_tracker import Tracker


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


def planned(config: TrainConfig, **plan: Any) -> TrainConfig:
    return replace(config, trainer=replace(config.trainer, **plan))


def steps_of(config: TrainConfig) -> list[int]:
    return [state_of(path)["global_step"] for path in Path(config.run_dir, "checkpoints").glob("last-*.ckpt")]


def test_the_profiler_writes_a_trace_that_a_browser_opens(config: TrainConfig) -> None:
    train(planned(config, profiler="pytorch"))
    events = json.loads(Path(config.run_dir, "trace.json").read_text())["traceEvents"]
    assert {"aten::mm", "aten::embedding"} <= {event.get("name") for event in events}


def test_training_that_learns_nothing_stops_early(config: TrainConfig) -> None:
    train(replace(planned(config, early_stopping=1, max_steps=20), optim=OptimConfig(lr=0.0)))
    assert steps_of(config) == [4]  # the second validation was no better than the first


def test_training_stops_when_its_time_is_up(config: TrainConfig) -> None:
    train(planned(config, max_time="00:00:00:01", max_steps=10**6, validate_every=10**6))
    assert 0 < steps_of(config)[0] < 10**6


def test_a_model_trained_on_a_gpu_is_measured_there(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though Lightning has moved the module back to the CPU by then."""
    measured = []
    monkeypatch.setattr(app, "best_device", lambda accelerator: CudaDevice(torch.device("cuda")))
    monkeypatch.setattr(app, "refuse_beyond_memory", lambda config, model: None)
    monkeypatch.setattr(app, "measure_both_lives", lambda case, *_: measured.append(case.device))
    monkeypatch.setattr(app, "environment_of", lambda command, device: environment(command, torch.device("cpu")))
    monkeypatch.setattr(app, "describe", lambda *_: None)
    monkeypatch.setattr(app, "conclude", lambda *_, **__: None)
    train(replace(config, measure=MeasureConfig()))
    assert measured == ["cuda"]


def card_of(config: TrainConfig) -> str:
    return Path(config.run_dir, "export", "README.md").read_text()


def test_a_run_whose_time_is_up_says_its_steps_and_is_gone_on_with(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    short = planned(config, max_time="1s", max_steps=10**6, validate_every=10**6, checkpoint_every=10**6)
    train(short)
    (taken,) = steps_of(config)
    told = capsys.readouterr().out
    assert 0 < taken < 10**6
    assert f"trainer.max_time is up; go on with: python train.py trainer.resume={config.run_dir}" in told
    assert f"- steps: {taken:,} steps, ended by trainer.max_time" in card_of(config)
    assert (Path(config.run_dir) / TIME_IS_UP).exists()
    train(planned(short, resume="auto"))  # with as much time again
    (further,) = steps_of(config)
    assert further > taken + 1
    assert f"going on from {config.run_dir}" in capsys.readouterr().out.replace("\n", "")


def test_a_run_that_took_all_its_steps_is_not_gone_on_with(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(planned(config, max_time="2h"))
    assert not (Path(config.run_dir) / TIME_IS_UP).exists()
    train(replace(planned(config, resume="auto"), run_dir=f"{config.run_dir}2"))
    assert "nothing to resume" in capsys.readouterr().out


def test_a_finished_run_that_is_named_is_left_as_it_is(config: TrainConfig) -> None:
    train(config)
    run = Path(config.run_dir)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for named in (run, *run.glob("checkpoints/last-*.ckpt")):
        with pytest.raises(BadInput, match=r"is finished \(6 of 6 steps\).* larger trainer\.max_steps"):
            train(planned(config, resume=str(named)))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_that_died_after_its_last_step_is_validated_when_it_goes_on(config: TrainConfig) -> None:
    train(config)
    run = Path(config.run_dir)
    (loss,) = select(read(run / "results.jsonl"), quantity="loss")
    (run / DONE).unlink()
    train(planned(config, resume=str(run)))
    (again,) = select(read(run / "results.jsonl"), quantity="loss")
    assert again.value == loss.value
    assert "not validated" not in card_of(config)


def test_the_same_weights_have_the_same_loss_whatever_the_batch(config: TrainConfig, tmp_path: Path) -> None:
    found = []
    for batch in (2, 12):
        still = replace(
            planned(config, max_steps=1, validation_batches=3),
            data=replace(config.data, batch=batch),
            optim=OptimConfig(lr=0.0),
            run_dir=str(tmp_path / str(batch)),
        )
        train(still)
        (row,) = select(read(Path(still.run_dir, "results.jsonl")), quantity="loss")
        assert row.conditions["held_out_tokens"] == 3 * 8 * 8
        found.append(row.value)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Noting(Tracker):
    def __init__(self) -> None:
        self.noted: dict[str, float] = {}

    def outcome(self, numbers: Mapping[str, float]) -> None:
        self.noted = dict(numbers)


def test_log_card_rows_and_tracker_tell_the_same_numbers(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Noting()
    monkeypatch.setattr("isoforward.app.telling.open_tracker", lambda *_, **__: tracker)
    (tmp_path / "book.txt").write_text("To be, or not to be: that is the question. " * 200)
    data = DataConfig(source="text", path=str(tmp_path / "book.txt"), tokenizer="char", batch=4, length=8)
    train(replace(planned(config, max_steps=7), data=replace(data, cache_dir=str(tmp_path / "cache")), hardware="h100"))
    results = read(Path(config.run_dir, "results.jsonl"))
    rows = {row.quantity: row for row in results.rows}
    assert {name: tracker.noted[name] for name in ("validation_loss", "bits_per_byte", "tokens_per_s", "steps")} == {
        "validation_loss": rows["loss"].value,
        "bits_per_byte": rows["bits_per_byte"].value,
        "tokens_per_s": rows["throughput"].value,
        "steps": rows["loss"].conditions["step"],
    }
    loss, bits = f"{rows['loss'].value:.3f} nats/token", f"{rows['bits_per_byte'].value:.3f} bits/byte"
    last = f"{loss} {bits}, perplexity {math.exp(rows['loss'].number):.4g}"
    steps = f"7 steps, {rows['throughput'].value:,.0f} tokens/s"
    told = capsys.readouterr().out
    assert "step     7  loss" in told and f"val {loss} {bits}" in told  # the last step, between two validations
    assert f": {steps}; {last}" in told
    assert f"- steps: {steps}; a step is 4 x 8 tokens" in card_of(config)
    assert f"- validation loss: {last}, on {rows['loss'].conditions['held_out_tokens']} tokens held out" in card_of(
        config
    )


@pytest.mark.slow
def test_a_peak_that_is_asked_for_is_the_one_that_is_told(config: TrainConfig) -> None:
    asked = MeasureConfig(repeats=5, warmup=1, prompt=2, new_tokens=2, context=8)
    train(replace(config, measure=asked, hardware="h100", precision="bf16"))
    (peak,) = select(read(Path(config.run_dir, "results.jsonl")), quantity="peak_flops")
    assert (peak.value, peak.conditions["hardware"]) == (989.5e12, "NVIDIA H100 SXM5 80GB")


@pytest.mark.parametrize("run_dir", [".", "a b/ö=1"])
def test_a_run_may_be_anywhere_and_needs_no_links(
    run_dir: Any,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(replace(config, run_dir=run_dir))
    link = Path(run_dir).resolve().parent / "latest"
    assert link.resolve() == Path(run_dir).resolve()
    link.unlink()
    monkeypatch.setattr(Path, "symlink_to", unsupported)
    train(replace(config, run_dir=f"{run_dir}/again"))
    assert "latest was not made (Operation not supported): name the run, checkpoint=" in capsys.readouterr().out
    assert (Path(run_dir) / "again" / DONE).exists()


def test_what_stands_where_the_link_would_be_is_left_alone(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest").write_text("mine")
    train(config)
    assert (tmp_path / "latest").read_text() == "mine"
    assert "latest was not made (something else is there)" in capsys.readouterr().out


def test_a_model_beyond_the_memory_is_refused_before_the_text_is_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isoforward.base.hardware.memory_bytes", lambda: 2 * 10**9)
    monkeypatch.setattr("isoforward.app.train.held_bytes", lambda: 5 * 10**8)
    monkeypatch.setattr("isoforward.app.train.prepare", lambda *_, **__: pytest.fail("it was read"))
    large = ModelConfig(layers=12, heads=12, width=768, context=1024, vocab=50257)
    with pytest.raises(
        BadInput, match=r"training 124,439,808 parameters .* takes 2\.\d+ GiB at least, and here are 1\.86 GiB"
    ):
        train(replace(config, model=large))
    assert not Path(config.run_dir).exists()


def of_other_shapes(state: Any) -> Any:
    """The same, but that every matrix has a row more."""
    if isinstance(state, torch.Tensor):
        return torch.cat([state, state[:1]]) if state.dim() == 2 else state
    if isinstance(state, dict):
        return {key: of_other_shapes(value) for key, value in state.items()}
    return [of_other_shapes(each) for each in state] if isinstance(state, list) else state


def test_a_whole_checkpoint_of_no_such_training_is_refused_by_name(config: TrainConfig) -> None:
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


def test_dropout_is_no_excuse_for_other_logits(config: TrainConfig) -> None:
    train(replace(config, model=replace(config.model, dropout=0.5)))
    assert load(Path(config.run_dir)).model.config.dropout == 0.5


def test_micro_batches_change_rounding_alone(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    train(replace(planned(config, accumulate=4), run_dir=str(tmp_path / "cut")))
    whole, cut = (load(Path(path)).model.state_dict() for path in (config.run_dir, tmp_path / "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
def test_an_accelerator_that_is_not_there_is_refused_before_anything_is_written(config: TrainConfig) -> None:
    with pytest.raises(BadInput, match=r"trainer\.accelerator=gpu: no CUDA device"):
        train(planned(config, accelerator="gpu"))
    assert not Path(config.run_dir).exists()


@pytest.mark.slow
def test_compiled_training_learns_the_same_and_exports_the_forward_that_was_not_compiled(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config)
    train(replace(config, compile=True, run_dir=str(tmp_path / "compiled")))
    eager, compiled = (load(Path(path)) for path in (config.run_dir, tmp_path / "compiled"))
    for name, tensor in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=0, atol=1e-4)
    assert compiled.generate("a", max_new_tokens=3, temperature=0)
