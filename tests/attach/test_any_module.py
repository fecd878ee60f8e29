"""Modules of other kinds in Lightning: vision, tabular, compiled, mixed precision; and trainings that go wrong."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from isoforward import PhaseCosts
from isoforward.base.results import select

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
BATCHES, BATCH = 12, 4


class Vision(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.net = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return functional.cross_entropy(self(batch["image"]), batch["kind"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Tabular(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.mlp = nn.Embedding(5, 3), nn.Sequential(nn.Linear(7, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        features = torch.cat((self.places(batch["kind"]), batch["numbers"]), dim=1)
        return functional.mse_loss(self.mlp(features)[:, 0], batch["numbers"].sum(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def loader() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"image": torch.randn(3, 8, 8, generator=draw), "kind": torch.tensor(n % 5),
         "numbers": torch.randn(4, generator=draw)}
        for n in range(BATCH * BATCHES)
    ]  # fmt: skip
    return DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


def fit(module: Any, where: Path, callbacks: list[Any], **more: Any) -> dict[str, Tensor]:
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=callbacks, default_root_dir=where, **QUIET, **more
    )
    trainer.fit(module, loader())
    return dict(module.state_dict())


@pytest.mark.parametrize(
    ("kind", "more", "unlike"),
    [
        (Vision, {"precision": "bf16-mixed", "gradient_clip_val": 1.0}, "BatchNorm2d"),
        (Vision, {"plugins": scaled, "gradient_clip_val": 1.0}, "BatchNorm2d"),
        (Tabular, {"accumulate_grad_batches": 2}, "Dropout"),
        (Tabular, {"compiled": True}, "Dropout"),
    ],
    ids=["vision, bf16", "vision, scaler", "tabular, accumulated", "tabular, compiled"],
)
def test_any_module_has_an_account_and_the_weights_it_would_have(
    kind: Any, more: dict[str, Any], unlike: str, tmp_path: Path
) -> None:
    weights, costs = [], PhaseCosts(every=1, warmup=1)
    for callbacks in ([], [costs]):
        torch.manual_seed(0)
        settings = {key: value() if callable(value) else value for key, value in more.items()}
        module = torch.compile(kind(), backend="eager") if settings.pop("compiled", False) else kind()
        weights.append(fit(module, tmp_path, list(callbacks), **settings))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert costs.phases is not None
    steps = BATCHES // more.get("accumulate_grad_batches", 1)
    phases = {row.phase: row for row in select(costs.phases.results, life="training", quantity="time")}
    compiled = "compiled" in more
    assert {"data", "forward", "backward", "optimizer", "step"} <= phases.keys()
    assert compiled == ("loss" not in phases)  # of a compiled step it is in the same graph as the forward
    assert len(phases["forward"].samples) == steps - 2  # less the warm-up, and the counted step
    modes = {row.conditions["as_in_training"] for row in select(costs.phases.results, quantity="between modes")}
    assert compiled or unlike in modes


def test_a_module_that_never_calls_backward_has_neither_backward_nor_loss(tmp_path: Path) -> None:
    class Skips(Tabular):
        def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
            super().training_step(batch, index)

    costs = PhaseCosts(every=1, warmup=1)
    fit(Skips(), tmp_path, [costs])
    assert costs.phases is not None
    phases = {row.phase for row in select(costs.phases.results, life="training", quantity="time")}
    assert {"forward", "optimizer", "step"} <= phases and not phases & {"backward", "loss"}


def test_a_training_that_is_interrupted_keeps_its_rows_and_its_interrupt(tmp_path: Path) -> None:
    class Interrupted(Tabular):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if index == 8:
                raise KeyboardInterrupt
            return super().training_step(batch, index)

    costs, backward = PhaseCosts(every=1, warmup=1, flops=False), torch.autograd.backward
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning ends the process
        fit(Interrupted(), tmp_path, [costs])
    assert torch.autograd.backward is backward
    assert costs.phases is not None
    assert {row.life for row in costs.phases.rows} == {"training"}
    assert len(costs.phases.time("training", "forward").samples) == 7
