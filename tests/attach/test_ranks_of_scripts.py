"""Scripts that train in two processes, as their own launchers start them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isoforward import Results, read
from isoforward.base.results import select

LIGHTNING = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn

from isoforward import PhaseCosts

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 4))
    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

if __name__ == "__main__":
    seed_everything(0)
    model = Module()
    data = torch.utils.data.TensorDataset(torch.randn(160, 8))
    watched = [PhaseCosts(every=2, warmup=1, results="rows.jsonl")] if "watched" in sys.argv else []
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=watched,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      accumulate_grad_batches=2)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=2))
    if trainer.global_rank == 0:
        print(f"{sum(weight.double().sum().item() for weight in model.parameters()):.17g}")
"""

PLAIN = """
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

distributed.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(24):
    model(torch.full((4, 8), float(step + distributed.get_rank()))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
if distributed.get_rank() == 0:
    print(f"{sum(weight.double().sum().item() for weight in model.parameters()):.17g}")
distributed.destroy_process_group()
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(where: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def times(found: Results) -> dict[str, int]:
    """Samples by phase of training."""
    return {row.phase: len(row.samples) for row in select(found, life="training", quantity="time")}


@pytest.mark.slow
def test_lightnings_ddp_has_the_phases_of_one_process_and_its_weights(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LIGHTNING)
    assert run(tmp_path, "own.py", "watched") == run(tmp_path, "own.py")
    found = read(tmp_path / "rows.jsonl")
    assert {"data", "forward", "loss", "backward", "optimizer", "logging", "communication"} <= times(found).keys()
    assert times(found)["forward"] == times(found)["loss"] == 9  # of 20 steps, less warm-up and counted, every other
    assert {row.conditions["model"] for row in found.rows} == {"Module"}
    assert {row.conditions["processes"] for row in found.rows} == {2}
    assert {"forward", "backward", "step"} <= {row.phase for row in select(found, quantity="between processes")}


@pytest.mark.slow
def test_torchrun_attaches_to_each_process_and_one_writes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PLAIN)
    assert run(tmp_path, *TORCHRUN, "-m", "isoforward", "attach", "own.py") == run(tmp_path, *TORCHRUN, "own.py")
    (directory,) = (tmp_path / "runs").iterdir()
    found = read(directory / "results.jsonl")
    assert {"forward", "loss", "backward", "optimizer", "step"} <= times(found).keys()
    assert {row.conditions["model"] for row in found.rows} == {"Sequential"}
    assert {"forward", "backward"} <= {row.phase for row in select(found, quantity="between processes")}
    assert select(found, quantity="averaging")
