"""Validation loss against seconds of training, through the Lightning module that every run trains with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from isoforward.base.config import TrainConfig
from isoforward.base.device import device_of
from isoforward.base.results import Row, RowFields
from isoforward.base.vocabulary import Condition
from isoforward.data.batches import TrainingBatches, ValidationBatches
from isoforward.data.corpus import Corpus
from isoforward.measure.case import Case
from isoforward.model.gpt import GPT
from isoforward.serve.inference import DTYPES
from isoforward.train.lightning_module import LitGPT, quieten

MARKS = 4  # validations of a training, where a question does not ask for more
WINDOWS, BATCHES = 32, 8  # of validation: the same text whatever the recipe's own batch


@dataclass(frozen=True, kw_only=True)
class Point:
    step: int
    time_s: float  # of training alone: data and framework count, validation does not
    loss: float


class Curve(Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.spent_s = 0.0
        self.points: list[Point] = []

    def on_train_start(self, *_: object) -> None:
        self.mark = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        device_of(module.device).settle()  # else a GPU's last steps would be counted to validation
        self.spent_s += time.perf_counter() - self.mark

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        loss = float(trainer.callback_metrics["validation_loss"])
        self.points.append(Point(step=trainer.global_step, time_s=self.spent_s, loss=loss))
        self.mark = time.perf_counter()


def held_out(corpus: Corpus, length: int) -> ValidationBatches:
    return ValidationBatches(corpus.validation, batch=WINDOWS, length=length, windows=WINDOWS * BATCHES)


def learning_curve(
    config: TrainConfig,
    corpus: Corpus,
    *,
    seed: int,
    length: int,
    marks: int,
    precision: str = "fp32",
    model: GPT | None = None,
) -> list[Point]:
    """Trains from scratch, or `model` on; `marks` validations on windows of `length`, the last one at the end."""
    seed_everything(seed, verbose=False)
    if model is None:
        sizes = replace(config.model, vocab=corpus.tokenizer.vocabulary)
        model = GPT(sizes, dtype=DTYPES[precision], checkpointing=config.trainer.checkpointing)
    every = max(1, config.trainer.max_steps // marks)
    plan = replace(config.trainer, max_steps=every * marks)
    curve, data = Curve(), config.data
    quieten()
    trainer = Trainer(
        accelerator=plan.accelerator,
        devices=1,
        max_steps=plan.max_steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = TrainingBatches(corpus.train, seed=seed, batch=data.batch, length=data.length, steps=plan.max_steps)
    loaders = (DataLoader(each, batch_size=None) for each in (batches, held_out(corpus, length)))
    trainer.fit(LitGPT(model, config.optim, plan, seed=seed), *loaders)
    return curve.points


def reached_s(points: Sequence[Point], loss: float) -> float | None:
    """When a straight line between validations first goes down to `loss`; None where it never does."""
    before = None
    for point in points:
        if point.loss <= loss:
            if before is None:
                return point.time_s
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.time_s + share * (point.time_s - before.time_s)
        before = point
    return None


def at_loss(rows: Sequence[Row], setting: str, loss: float) -> float | None:
    """`setting` (seconds, steps, FLOPs) at which the curve of these rows is down at `loss`; None where it never is."""
    points = [Point(step=0, time_s=row.setting(setting), loss=row.number) for row in rows]
    return reached_s(points, loss)


def loss_rows(case: Case, runs: Sequence[Sequence[Point]], **conditions: Condition) -> Iterator[Row]:
    """Each mark of the same training under several seeds: the median loss, the lowest and the highest."""
    about: RowFields = {"life": "training", "phase": "run", "quantity": "loss", "per": "token"}
    for points in zip(*runs, strict=True):
        at = {"training_time_s": round(median(point.time_s for point in points), 2), "step": points[0].step}
        yield case.row(about, middle([point.loss for point in points]), conditions={**conditions, **at})


def flops_curve(case: Case, runs: Sequence[Sequence[Point]], step_flops: int, **conditions: Condition) -> Iterator[Row]:
    """The same marks against the FLOPs of all steps so far."""
    for each in loss_rows(case, runs, **conditions):
        at = {**each.conditions, "training_gflop": round(step_flops * int(str(each.conditions["step"])) / 1e9, 3)}
        del at["training_time_s"]
        yield replace(each, quantity="loss_by_flops", conditions=at)


def middle(samples: Sequence[float]) -> RowFields:
    """Too few for an interval of known confidence: their median and their range."""
    return {
        "value": median(samples),
        "low": min(samples),
        "high": max(samples),
        "interval": "range",
        "samples": tuple(samples),
    }
