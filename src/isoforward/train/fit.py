"""One training under Lightning, from a model and a corpus to what came of it."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from rich.console import Console
from torch.utils.data import DataLoader

from isoforward.base.checks import duration_s
from isoforward.base.config import VALIDATION_ROWS, TrainConfig, TrainerConfig
from isoforward.base.device import best_device
from isoforward.base.errors import Integrity, Refusal
from isoforward.base.malloc import keep_freed_pages
from isoforward.base.terminal import say
from isoforward.data.batches import TrainingBatches, ValidationBatches
from isoforward.data.corpus import Corpus
from isoforward.formats import checkpoint_file
from isoforward.formats.untrusted import shown
from isoforward.model.gpt import GPT
from isoforward.model.kernels import backward_of, use_backward
from isoforward.train.callbacks import LiveTracker, Trace, Track, Watch
from isoforward.train.checkpoint_io import StateFileIO
from isoforward.train.distributed import environment, rank, strategy_of, whole
from isoforward.train.lightning_module import LitGPT, Timed, quieten
from isoforward.train.outcome import Outcome
from isoforward.train.stopping import KeepBest, KeepLast, StopOnSignal, StopOnTime, ValidateLast

TIME = "trainer.max_time"


def fit(
    config: TrainConfig,
    model: GPT,
    corpus: Corpus,
    run_dir: Path,
    checkpoint: Path | None,
    console: Console,
    tracker: LiveTracker | None = None,
) -> tuple[LitGPT, Outcome, int | None]:
    """The trained module, what came of it, and the signal that ended it early. Without a tracker this is a rank that
    leaves no trace.
    """
    plan = config.trainer
    share = (rank(), plan.devices * plan.nodes)
    together = config.data.batch // (plan.accumulate * share[1])
    shape = {"batch": together, "length": config.data.length}
    device = best_device(plan.accelerator).where
    use_backward(model, backward_of(model.config, model.dtype, device, **shape))
    if config.compile:
        model.compile_blocks()
    module = LitGPT(model, config.optim, plan, seed=config.seed)
    validate_every = min(plan.validate_every, plan.max_steps)
    signals = StopOnSignal(validate_every)
    clock = StopOnTime(duration_s("trainer.max_time", plan.max_time)) if plan.max_time is not None else None
    held_out = ValidationBatches(
        corpus.validation,
        batch=config.data.batch // plan.accumulate,
        length=config.data.length,
        windows=plan.validation_batches * VALIDATION_ROWS,
        shard=share,
    )
    tokens_per_step, bytes_per_token = config.data.batch * config.data.length, corpus.bytes_a_token(held_out.judged)
    watch = Watch(console, tokens_per_step=tokens_per_step, bytes_per_token=bytes_per_token, live=plan.progress)
    checkpoints = run_dir / "checkpoints"
    callbacks: list[Callback] = []
    if tracker is not None:
        corpus.tokenizer.save(checkpoints / "tokenizer.json")
        callbacks = [watch, Track(tracker, config, module)]
        if plan.profiler is not None:
            callbacks.append(Trace(run_dir / "trace.json"))
    if plan.early_stopping is not None:
        callbacks.append(EarlyStopping("validation_loss", patience=plan.early_stopping))
    callbacks += [
        signals,
        *([clock] if clock else []),
        ValidateLast(),
        KeepBest(checkpoints),
        KeepLast(checkpoints, plan.checkpoint_every, validate_every),
    ]
    quieten()
    keep_freed_pages()
    trainer = Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        num_nodes=plan.nodes,
        strategy=strategy_of(config),
        max_steps=plan.max_steps,
        max_epochs=-1,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks,
        plugins=[StateFileIO(), environment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        use_distributed_sampler=False,
    )
    data = config.data
    begun = 0 if checkpoint is None else checkpoint_file.load(checkpoint, only=("global_step",)).get("global_step", 0)
    loader = DataLoader(
        TrainingBatches(
            corpus.train,
            seed=config.seed,
            batch=data.batch,
            length=data.length,
            steps=plan.max_steps,
            start=begun,
            shard=share,
        ),
        batch_size=None,
        num_workers=data.workers,
    )
    validation = DataLoader(held_out, batch_size=None)
    started = time.monotonic()
    try:
        with signals.listening():
            trainer.fit(module, Timed(loader, module.waits_s), validation, ckpt_path=checkpoint)
    except Exception as error:
        if checkpoint is None or module.begun or isinstance(error, Refusal):
            raise
        said = shown(str(error).strip().partition("\n")[0])
        raise Integrity(f"{checkpoint} is whole, but this training cannot go on from it: {said}") from error
    if "validation_loss" not in trainer.callback_metrics and signals.received is None:
        trainer.callbacks = []  # all steps were taken before this start: no state is newer than what is kept
        trainer.validate(module, validation, verbose=False)
    if plan.strategy == "fsdp" or config.compile:
        module.model = whole(module.model)
    loss, rate = trainer.callback_metrics.get("validation_loss"), module.pace.steps_per_s()
    outcome = Outcome(
        steps=module.global_step,
        tokens_per_step=tokens_per_step,
        loss=None if loss is None else float(loss),
        judged_tokens=len(held_out.judged),
        bytes_per_token=bytes_per_token,
        tokens_per_s=None if rate is None else rate * tokens_per_step,
        ended_by=ended_by(module.global_step, plan, clock),
    )
    say(console, f"trained in {time.monotonic() - started:.0f} s: {outcome.told_steps()}; {outcome.told_loss()}")
    return module, outcome, signals.received


def ended_by(steps: int, plan: TrainerConfig, clock: StopOnTime | None) -> str | None:
    if steps >= plan.max_steps:
        return None
    if clock is not None and clock.up:
        return TIME
    return None if plan.early_stopping is None else "trainer.early_stopping"
