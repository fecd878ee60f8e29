"""Figures go to the user's own loggers, at the step that the trainer's own are at; an open W&B run gets the rest."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn

from isoforward import PhaseCosts
from tests.attach import planted_training as plant

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class TwoOptimizers(lightning.LightningModule):
    """Its global_step counts the steps of both; Lightning's x axis counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch: Tensor, index: int) -> None:
        self.log("own", float(index))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.second(self.first(batch)).mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]


class Accumulates(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.linear(batch).mean()
        self.log("own", loss)
        return loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("module", "accumulate"), [(TwoOptimizers, 1), (Accumulates, 3)])
def test_figures_stand_at_the_steps_of_the_trainers_own(module: Any, accumulate: int, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[PhaseCosts(every=1, warmup=1)],
        log_every_n_steps=2, accumulate_grad_batches=accumulate, default_root_dir=tmp_path, **QUIET,
    )  # fmt: skip
    trainer.fit(module(), plant.loader(plant.PlantedClock(), 12 * accumulate))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    own = [int(row["step"]) for row in rows if row["own"]]
    ours = [int(row["step"]) for row in rows if row["phase/forward_s"]]
    assert own == [1, 3, 5, 7, 9, 11]
    assert ours and ours == own[-len(ours) :] and len(ours) >= 4  # none before a step was timed


def steps_of_tensorboard(directory: Path) -> dict[str, list[int]]:
    """Steps on the x axis, by tag."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = directory.rglob("events.out.tfevents.*")
    read = events.EventAccumulator(str(file)).Reload()
    return {tag: [event.step for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_lightnings_tensorboard_has_them_at_its_own_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=TensorBoardLogger(tmp_path), default_root_dir=tmp_path,
        callbacks=[PhaseCosts(every=1, warmup=1)], log_every_n_steps=2, accumulate_grad_batches=3, **QUIET,
    )  # fmt: skip
    trainer.fit(Accumulates(), plant.loader(plant.PlantedClock(), 36))
    steps = steps_of_tensorboard(tmp_path)
    assert steps["own"] == [1, 3, 5, 7, 9, 11]
    for phase in ("data", "forward", "backward", "optimizer", "step"):
        assert steps[f"phase/{phase}_s"] == [3, 5, 7, 9, 11]


def train_transformers(where: Path, report_to: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from isoforward import PhaseCostsCallback

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 24
    arguments = transformers.TrainingArguments(
        str(where), per_device_train_batch_size=2, use_cpu=True, num_train_epochs=1, disable_tqdm=True,
        report_to=[report_to], logging_steps=2, save_strategy="no",
    )  # fmt: skip
    callbacks = [PhaseCostsCallback(every=1, warmup=1)]
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()


def test_transformers_tensorboard_has_them_at_its_own_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train_transformers(tmp_path, "tensorboard")
    steps = steps_of_tensorboard(tmp_path)
    assert steps["train/loss"] == [2, 4, 6, 8, 10, 12]
    for phase in ("data", "forward", "loss", "backward", "clipping", "optimizer", "step"):
        assert steps[f"train/phase/{phase}_s"] == [4, 6, 8, 10, 12]  # where Transformers puts all that it logs


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setitem(os.environ, name, value)
    yield wandb
    wandb.finish()


def noted(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[dict[str, Any]]:
    logged: list[dict[str, Any]] = []
    log = type(run).log

    def note(self: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        logged.append(data)
        log(self, data, *args, **kwargs)

    monkeypatch.setattr(type(run), "log", note)
    return logged


@pytest.mark.slow
def test_a_run_of_lightnings_wandb_logger_gets_figures_rows_and_report(
    offline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logged = noted(monkeypatch, logger.experiment)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[PhaseCosts(every=1, warmup=1)],
        log_every_n_steps=2, default_root_dir=tmp_path, **QUIET,
    )  # fmt: skip
    trainer.fit(Accumulates(), plant.loader(plant.PlantedClock(), 12))
    figures = [data for data in logged if "phase/forward_s" in data]
    assert [data["trainer/global_step"] for data in figures] == [3, 5, 7, 9, 11]
    (rows,) = [data["rows"] for data in logged if "rows" in data]
    assert {"training", "inference"} <= {cell for row in rows.data for cell in row if isinstance(cell, str)}
    assert any("report" in data for data in logged)
    assert offline.run is logger.experiment  # theirs, still open


@pytest.mark.slow
def test_a_run_that_transformers_reports_to_gets_figures_rows_and_report(
    offline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logged = noted(monkeypatch, offline.sdk.wandb_run.Run.__new__(offline.sdk.wandb_run.Run))
    train_transformers(tmp_path, "wandb")
    figures = [data for data in logged if "train/phase/forward_s" in data]
    assert [data["train/global_step"] for data in figures] == [4, 6, 8, 10, 12]
    assert all("train/loss" in data for data in figures)
    assert sum("rows" in data for data in logged) == sum("report" in data for data in logged) == 1
    assert offline.run is not None  # theirs, still open


@pytest.mark.slow
def test_a_run_that_a_plain_script_has_open_is_told_too(
    offline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from isoforward.attach.script import run_script

    script = tmp_path / "own.py"
    script.write_text(
        "import torch, wandb\nrun = wandb.init(project='theirs')\nmodel = torch.nn.Linear(4, 2)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for step in range(20):\n    loss = model(torch.ones(2, 4)).mean()\n    loss.backward()\n"
        "    optimizer.step()\n    optimizer.zero_grad()\n    run.log({'loss': loss.item()}, step=step)\n"
    )
    logged = noted(monkeypatch, offline.sdk.wandb_run.Run.__new__(offline.sdk.wandb_run.Run))
    run_script(str(script), [], tmp_path / "run")
    assert [set(data) for data in logged[:20]] == [{"loss"}] * 20
    assert "rows" in logged[20] and "report" in logged[21]
