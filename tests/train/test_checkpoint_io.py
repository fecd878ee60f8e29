import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from isoforward.base.errors import Integrity
from isoforward.formats.checkpoint_file import load, newest_good, verify
from isoforward.train.checkpoint_io import StateFileIO


class Small(LightningModule):
    """Manual optimization, dropout, a validation loss; batch and dropout of step k are functions of k."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        optimizer = self.optimizers()
        torch.manual_seed(self.global_step)
        self.manual_backward(self.layers(torch.randn(4, 6)).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("validation_loss", self.layers(batch).square().mean())


def fit(directory: Path, steps: int, *, resume: Path | None = None, every: int = 2) -> tuple[Small, Trainer]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(3, verbose=False)
    module = Small()
    batches: Any = torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        plugins=[StateFileIO()],
        callbacks=[
            ModelCheckpoint(directory, filename="last-{step}", every_n_train_steps=every, save_top_k=1),
            ModelCheckpoint(directory, filename="best-{step}", monitor="validation_loss", save_top_k=1),
            EarlyStopping("validation_loss", patience=99),
        ],
        val_check_interval=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module, DataLoader(batches, batch_size=None), DataLoader(batches[:2], batch_size=None), ckpt_path=resume
        )
    return module, trainer


def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole, its_trainer = fit(tmp_path / "whole", 10)
    fit(tmp_path / "cut", 6)
    resumed, trainer = fit(tmp_path / "cut", 10, resume=newest_good(tmp_path / "cut"))
    assert trainer.global_step == its_trainer.global_step == 10
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    left, right = (t.optimizers[0].state_dict()["state"] for t in (its_trainer, trainer))
    assert all(torch.equal(left[p][key], right[p][key]) for p in left for key in left[p])


def good(directory: Path) -> Path:
    found = newest_good(directory)
    assert found is not None
    return found


def test_the_last_and_the_best_are_kept_and_the_others_removed_whole(tmp_path: Path) -> None:
    fit(tmp_path, 10)
    last, best = good(tmp_path), next(tmp_path.glob("best*"))
    assert sorted(tmp_path.iterdir()) == sorted([last, best])
    assert load(last)["global_step"] == 10
    verify(best)


def test_resuming_from_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    path = good(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Integrity, match=path.name):
        fit(tmp_path, 4, resume=path)


def test_a_save_sweeps_up_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".last-step=1.ckpt.0a1b2c3d.partial").write_bytes(b"half")
    StateFileIO().save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
