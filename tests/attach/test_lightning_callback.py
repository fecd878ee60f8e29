"""`PhaseCosts` in Lightning's own loop, with automatic and manual optimization."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from isoforward import PhaseCosts, read
from tests.attach import planted_training as plant


class Module(lightning.LightningModule):
    def __init__(self, clock: plant.PlantedClock, *, automatic: bool, accumulate: int) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.clock, self.accumulate = clock, accumulate
        self.model, self.criterion = plant.Model(clock), plant.Criterion(clock)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.criterion(self.model(batch))
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss / self.accumulate)
            if (index + 1) % self.accumulate == 0 or self.trainer.is_last_batch:
                optimizer: Any = self.optimizers()
                self.clip_gradients(optimizer, gradient_clip_val=1.0)
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.clock.take(plant.VALIDATION)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return plant.update(self.model, self.clock)


class Slow(lightning.Callback):
    def __init__(self, clock: plant.PlantedClock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.take(plant.CALLBACK)

    def on_save_checkpoint(self, *args: Any) -> None:
        self.clock.take(plant.CHECKPOINT)


def fit(where: Path, *, automatic: bool, accumulate: int, batches: int, callbacks: Any = (), **more: Any) -> Any:
    clock = plant.PlantedClock()
    module = Module(clock, automatic=automatic, accumulate=accumulate)
    costs = PhaseCosts(every=1, warmup=0, flops=False, clock=clock)
    if automatic:
        more |= {"gradient_clip_val": 1.0, "accumulate_grad_batches": accumulate}
    trainer = lightning.Trainer(
        default_root_dir=where,
        max_epochs=1,
        accelerator="cpu",
        callbacks=[costs, *[callback(clock) for callback in callbacks], ModelCheckpoint(where)],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=1,
        logger=CSVLogger(where),
        **more,
    )
    with plant.slow_clipping(clock):
        trainer.fit(module, plant.loader(clock, batches), plant.loader(clock, 2))
    return costs, module, trainer


@pytest.mark.parametrize("automatic", [True, False])
def test_what_is_planted_in_a_phase_is_found_there(
    automatic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = plant.watched_accounts(monkeypatch)
    costs, module, _ = fit(tmp_path, automatic=automatic, accumulate=3, batches=7, callbacks=[Slow])
    (account,) = accounts
    expected = [plant.planted(n, logging=n * plant.CALLBACK) for n in (3, 3, 1)]
    assert [plant.told(step.phases) for step in account.steps] == expected
    validation = 2 * plant.VALIDATION + plant.fetched(2)
    assert account.occasions_s == {"validation": validation, "checkpointing": plant.CHECKPOINT}
    assert costs.phases.time("inference", "forward").value == 3 * plant.FORWARD
    assert costs.phases.time("training", "validation").value == validation
    assert module.training


def test_rows_and_the_loggers_figures_are_written(tmp_path: Path) -> None:
    costs, _, trainer = fit(tmp_path, automatic=True, accumulate=1, batches=6)
    path = Path(trainer.log_dir) / "phase_costs" / "results.jsonl"
    assert read(path).rows == costs.phases.rows
    logged = (Path(trainer.log_dir) / "metrics.csv").read_text()
    assert {"phase/forward_s", "phase/step_s", "phase/data_s"} <= set(logged.splitlines()[0].split(","))


@pytest.mark.parametrize("automatic", [True, False])
def test_weights_are_what_they_are_without_it(automatic: bool, tmp_path: Path) -> None:
    def weights(callbacks: list[Any]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module = Module(plant.PlantedClock(), automatic=automatic, accumulate=1)
        more = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(
            default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, callbacks=callbacks, **more
        )
        trainer.fit(module, plant.loader(plant.PlantedClock(), 9))
        return module.state_dict()

    without, watched = weights([]), weights([PhaseCosts(every=2, warmup=1)])
    assert all(torch.equal(value, watched[name]) for name, value in without.items())


def test_a_step_that_raises_is_theirs_and_our_rows_end_cleanly(tmp_path: Path) -> None:
    class Fails(lightning.Callback):
        def __init__(self, clock: plant.PlantedClock) -> None: ...

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 4:
                raise ZeroDivisionError("theirs")

    backward = torch.autograd.backward
    with pytest.raises(ZeroDivisionError, match="theirs"):
        fit(tmp_path, automatic=True, accumulate=1, batches=7, callbacks=[Fails])
    assert torch.autograd.backward is backward
    (path,) = tmp_path.rglob("phase_costs/results.jsonl")
    rows = read(path).rows
    assert {row.life for row in rows} == {"training"}
    assert next(row for row in rows if row.phase == "forward").samples == (plant.FORWARD,) * 4


def test_a_module_with_several_networks_is_measured_as_one(tmp_path: Path) -> None:
    class Gan(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

        def training_step(self, batch: Tensor, index: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.generator(batch)).mean())
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]

    costs = PhaseCosts(every=1, warmup=1)
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, callbacks=[costs],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Gan(), plant.loader(plant.PlantedClock(), 10))
    assert costs.phases is not None
    assert len(costs.phases.time("training", "forward").samples) == 8  # less the warm-up, and the step that is counted
    flops = {row.phase: row.value for row in costs.phases.rows if row.quantity == "flops"}
    generator, critic = 2 * 2 * 4 * 4, 2 * 2 * 4
    assert flops["forward"] == 2 * (generator + critic)


def test_a_trainer_of_pytorch_lightning_is_measured_too(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")
    demos = pytest.importorskip("pytorch_lightning.demos.boring_classes")
    clock = plant.PlantedClock()

    costs = PhaseCosts(every=1, warmup=1, flops=False, clock=clock, results=tmp_path / "results.jsonl")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = other.Trainer(
        default_root_dir=tmp_path, max_steps=8, accelerator="cpu", logger=False, callbacks=[costs, Slow(clock)], **quiet
    )
    trainer.fit(demos.BoringModel())
    assert costs.phases is not None
    assert costs.phases.time("training", "logging").samples == (plant.CALLBACK,) * 7
