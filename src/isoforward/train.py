"""What `python train.py` does: train, freeze and export, serve, compare both lives, report."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import PyTorchProfiler
from omegaconf import OmegaConf
from rich.console import Console
from torch.utils.data import DataLoader

from isoforward import statefile
from isoforward.both_lives import TRAINING, measure_both_lives
from isoforward.checkpoint import StateFileIO
from isoforward.config import TrainConfig
from isoforward.data import Corpus, TrainingBatches, ValidationBatches, prepare
from isoforward.display import Watch
from isoforward.entry import claim
from isoforward.errors import BadInput, Integrity, Stopped
from isoforward.experiment import command_line, conclude, fingerprint_of, precision_of, say, tracker_of
from isoforward.inference import DTYPES, load
from isoforward.lit import LitGPT, Timed, quieten
from isoforward.measure import Case
from isoforward.model import GPT
from isoforward.statefile import newest_good, verify
from isoforward.tracking import Tracker
from isoforward.weights import export, load_tokenizer, load_trainable


class Track(Callback):  # type: ignore[misc]
    """Tells the tracker how training goes, between steps."""

    def __init__(self, tracker: Tracker, tokens_per_step: int, every: int = 10) -> None:
        self.tracker, self.tokens_per_step, self.every = tracker, tokens_per_step, every

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        step = trainer.global_step
        if step % self.every or not module.recent:
            return
        whole_s = sum(lap["step"] for lap in module.recent)
        shares = {
            f"phase/{name}_share": sum(lap.get(name, 0.0) for lap in module.recent) / whole_s for name in TRAINING
        }
        rate = len(module.recent) * self.tokens_per_step / whole_s
        figures = {"loss": module.losses[-1].item(), "gradient_norm": module.norm.item(), "tokens_per_s": rate}
        self.tracker.live(step, figures | shares)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self.tracker.live(trainer.global_step, {"validation_loss": float(trainer.callback_metrics["validation_loss"])})


class StopOnSignal(Callback):  # type: ignore[misc]
    """SIGINT and SIGTERM end training after the step under way, with a checkpoint; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.received is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def device_of(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise BadInput("trainer.accelerator=gpu: no CUDA device is here; write trainer.accelerator=cpu or auto")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def fresh_or_loaded(config: TrainConfig, corpus: Corpus, dtype: torch.dtype) -> GPT:
    size = corpus.tokenizer.vocabulary
    if config.model.source == "hf":
        return load_trainable(Path(str(config.model.path)), dtype=dtype, checkpointing=config.trainer.checkpointing)
    if config.model.source == "transformers":
        raise BadInput("model=transformers is measured, not trained; write model=hf for GPT-2 and Llama families")
    if config.model.vocab is not None and config.model.vocab < size:
        raise BadInput(f"model.vocab={config.model.vocab} is smaller than the tokenizer's {size}; leave it out")
    model = dataclasses.replace(config.model, vocab=config.model.vocab or size)
    return GPT(model, dtype=dtype, checkpointing=config.trainer.checkpointing)


def train(config: TrainConfig) -> None:
    console = Console()
    device = device_of(config.trainer.accelerator)
    precision, why = precision_of(config.precision, device)
    checkpoint = to_resume(config, console)
    if checkpoint is not None:
        config = dataclasses.replace(config, run_dir=str(checkpoint.parent.parent))
        refuse_another(config)
    pretrained = Path(str(config.model.path)) if config.model.source == "hf" else None
    corpus = prepare(config.data, load_tokenizer(pretrained) if pretrained else None, seed=config.seed)
    for line in corpus.description:
        console.print(line, markup=False, highlight=False)
    seed_everything(config.seed, verbose=False)
    model = fresh_or_loaded(config, corpus, DTYPES[precision])
    with claim(config, resuming=checkpoint is not None) as run_dir:
        parameters = sum(p.numel() for p in model.parameters())
        say(console, f"{parameters:,} parameters in {precision} ({why})")
        say(console, f"everything goes to {run_dir}")
        with tracker_of(config, run_dir, console, "train") as tracker:
            module, stopped = fit(config, model, corpus, run_dir, checkpoint, console, tracker)
            if stopped is None:
                exported = export(module.model.cpu(), run_dir / "export", tokenizer=corpus.tokenizer)
                tracker.export(exported, fingerprint_of(exported))
        if stopped is not None:
            how = f"go on with: python train.py trainer.resume={run_dir}"
            raise Stopped(stopped, f"stopped after step {module.global_step}; {how}")
        finish(config, module, corpus, run_dir, console)


def to_resume(config: TrainConfig, console: Console) -> Path | None:
    """The checkpoint that `trainer.resume` means: a file, or the newest good one of a run that has not finished."""
    wanted = config.trainer.resume
    if wanted is None:
        return None
    if wanted == "auto":
        runs = sorted(Path(config.run_dir).parent.glob("*/checkpoints"), key=lambda path: path.stat().st_mtime)
        unfinished = [path for path in runs if not (path.parent / "export").exists()]
        for directory in reversed(unfinished):
            if (found := newest_good(directory)) is not None:
                say(console, f"going on from {found}")
                return found
        say(console, "nothing to resume: starting afresh")
        return None
    path = Path(wanted)
    if path.is_file():
        verify(path)
        return path
    if not path.is_dir():
        raise BadInput(f"trainer.resume={wanted} does not exist; write auto, a run directory or a checkpoint")
    found = newest_good(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise BadInput(f"trainer.resume={wanted} holds no good checkpoint")
    return found


MAY_DIFFER = ("run_dir", "tracking", "trainer.resume", "trainer.progress", "trainer.max_time", "trainer.profiler")


def refuse_another(config: TrainConfig) -> None:
    """A run goes on under the config that it began with, or its weights would be nobody's."""
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        raise BadInput(f"{path} is missing: trainer.resume goes on with a run of python train.py")
    began = flat(OmegaConf.to_container(OmegaConf.load(path)))
    now = flat(dataclasses.asdict(config))
    keys = sorted(key for key in began.keys() | now.keys() if not key.startswith(MAY_DIFFER))
    if unlike := [
        f"{key}={now.get(key)} (began with {began.get(key)})" for key in keys if began.get(key) != now.get(key)
    ]:
        raise BadInput(f"{config.run_dir} is a run of another configuration: {', '.join(unlike)}")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in flat(branch, f"{prefix}{name}.").items()}


def finish(config: TrainConfig, module: LitGPT, corpus: Corpus, run_dir: Path, console: Console) -> None:
    """The weights' other life: exported, proven the same, measured beside training, and heard."""
    model, exported = module.model, run_dir / "export"
    served = load(exported)
    tokens = torch.from_numpy(np.asarray(corpus.validation[: config.data.length], dtype=np.int64))[None]
    differing = int((model.train()(tokens).detach() != served(tokens)).sum())
    if differing and not config.model.dropout:
        raise Integrity(f"{exported}: {differing} logits of the frozen forward differ from those of training's forward")
    say(console, f"exported to {exported}: the frozen forward gives training's logits, bit for bit")
    results = run_dir / "results.jsonl"
    results.unlink(missing_ok=True)  # of an attempt that did not finish
    if config.measure.enabled:
        case = Case(
            experiment="train",
            model=model.config,
            export=str(exported),
            batch=config.data.batch,
            length=config.data.length,
            accumulate=config.trainer.accumulate,
            checkpointing=config.trainer.checkpointing,
            compile=config.compile,
            precision="bf16" if model.dtype == torch.bfloat16 else "fp32",
            device=str(module.device),
            threads=torch.get_num_threads(),
            seed=config.seed,
            optim=config.optim,
            measure=config.measure,
        )
        with console.status("measuring both lives"):
            measure_both_lives(case, results, command_line())
    prompt = config.sample_prompt
    sample = prompt + str(served.generate(prompt, max_new_tokens=100, seed=config.seed))
    if config.measure.enabled:
        conclude(config, run_dir, console, job_type="inference", sample=sample)
    else:
        say(console, f"\n{sample}\n")
    latest = run_dir.parent / "latest"
    waiting = latest.with_name(f".latest-{os.getpid()}")
    waiting.symlink_to(run_dir.name)
    waiting.replace(latest)
    say(console, f"text     python generate.py checkpoint={run_dir} prompt={prompt!r}")


def fit(
    config: TrainConfig,
    model: GPT,
    corpus: Corpus,
    run_dir: Path,
    checkpoint: Path | None,
    console: Console,
    tracker: Tracker,
) -> tuple[LitGPT, int | None]:
    plan = config.trainer
    module = LitGPT(model, config.optim, plan)
    signals = StopOnSignal()
    watch = Watch(
        console,
        tokens_per_step=config.data.batch * config.data.length,
        bytes_per_token=corpus.bytes_per_token,
        live=plan.progress,
    )
    checkpoints = run_dir / "checkpoints"
    corpus.tokenizer.save(checkpoints / "tokenizer.json")
    last = ModelCheckpoint(
        dirpath=checkpoints,
        filename="last-{step:06d}",
        auto_insert_metric_name=False,
        every_n_train_steps=plan.checkpoint_every,
        save_top_k=1,
    )
    best = ModelCheckpoint(
        dirpath=checkpoints,
        filename="best-{step:06d}",
        auto_insert_metric_name=False,
        monitor="validation_loss",
        save_top_k=1,
    )
    callbacks: list[Callback] = [watch, Track(tracker, watch.tokens_per_step), signals, last, best]
    if plan.early_stopping is not None:
        callbacks.append(EarlyStopping("validation_loss", patience=plan.early_stopping))
    quieten()
    trainer = Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        strategy=plan.strategy,
        max_steps=plan.max_steps,
        max_time=plan.max_time,
        max_epochs=-1,
        val_check_interval=min(plan.validate_every, plan.max_steps),
        check_val_every_n_epoch=None,
        limit_val_batches=plan.validation_batches,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks,
        plugins=[StateFileIO()],
        profiler=PyTorchProfiler(dirpath=run_dir, filename="trace") if plan.profiler else None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        use_distributed_sampler=False,
    )
    data = config.data
    loader = DataLoader(
        TrainingBatches(
            corpus.train,
            seed=config.seed,
            batch=data.batch,
            length=data.length,
            steps=plan.max_steps,
            start=0 if checkpoint is None else statefile.load(checkpoint, only=("global_step",))["global_step"],
        ),
        batch_size=None,
        num_workers=data.workers,
    )
    validation = DataLoader(ValidationBatches(corpus.validation, batch=data.batch, length=data.length), batch_size=None)
    started = time.monotonic()
    trainer.fit(module, Timed(loader), validation, ckpt_path=checkpoint)
    say(console, f"trained in {time.monotonic() - started:.0f} s")
    return module, signals.received
