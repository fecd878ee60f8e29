"""What `python train.py` does: train, freeze and export, serve, compare both lives, report."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from rich.console import Console
from torch.utils.data import DataLoader

from isoforward.app.command_line import claim
from isoforward.app.question import (
    at_most,
    call,
    command_line,
    conclude,
    fingerprint_of,
    fitting,
    precision_of,
    tracker_of,
)
from isoforward.base.config import ModelConfig, TrainConfig
from isoforward.base.device import best_device
from isoforward.base.errors import BadInput, Integrity, Refusal, Stopped
from isoforward.base.malloc import keep_freed_pages
from isoforward.base.results import read
from isoforward.base.terminal import say
from isoforward.base.units import size
from isoforward.data.batches import TrainingBatches, ValidationBatches
from isoforward.data.corpus import Corpus, prepare
from isoforward.formats import checkpoint_file
from isoforward.formats.export import export, load_tokenizer, load_trainable, read_manifest, weights_section
from isoforward.formats.model_card import write_card
from isoforward.formats.untrusted import harmless, shown
from isoforward.lesson.page import write_lesson
from isoforward.measure.both_lives import measure_both_lives
from isoforward.measure.case import Case, differing_logits, with_kernels
from isoforward.model import cost
from isoforward.model.autotune import choose_backward
from isoforward.model.gpt import GPT
from isoforward.serve.inference import DTYPES, load
from isoforward.show.compare import compare
from isoforward.show.model_card import about_costs, about_text, about_training
from isoforward.show.wandb_tracker import Tracker
from isoforward.train.callbacks import Trace, Track, Watch
from isoforward.train.checkpoint_io import StateFileIO
from isoforward.train.distributed import (
    environment,
    followers,
    rank,
    refuse_what_cannot_be_shared,
    strategy_of,
    whole,
)
from isoforward.train.lightning_module import LitGPT, Timed, quieten
from isoforward.train.stopping import (
    KeepBest,
    KeepLast,
    StopOnSignal,
    refuse_another,
    refuse_other_tokens,
    to_resume,
)


def fresh_or_loaded(config: TrainConfig, corpus: Corpus, dtype: torch.dtype) -> GPT:
    tokens = corpus.tokenizer.vocabulary
    if config.model.source == "hf":
        path = Path(str(config.model.path))
        model = load_trainable(path, dtype=dtype, checkpointing=config.trainer.checkpointing)
        fitting(config, model.config)
        if (needed := corpus.tokenizer.plain) > (rows := model.config.vocabulary):
            raise BadInput(
                f"model.path={path}: text needs {needed} rows of the embedding, which has {rows}; remove the tokens "
                "that were added to its tokenizer.json"
            )
        return model
    if config.model.source == "transformers":
        raise BadInput("model=transformers is measured, not trained; write model=hf for GPT-2 and Llama families")
    if config.model.vocab is not None and config.model.vocab < tokens:
        raise BadInput(f"model.vocab={config.model.vocab} is smaller than the tokenizer's {tokens}; leave it out")
    fresh = dataclasses.replace(config.model, vocab=config.model.vocab or tokens)
    refuse_beyond_memory(config, fresh)
    return GPT(fresh, dtype=dtype, checkpointing=config.trainer.checkpointing)


def refuse_beyond_memory(config: TrainConfig, model: ModelConfig) -> None:
    """Told in a second, where the system would take minutes to end the program without a word."""
    device = best_device(config.trainer.accelerator)
    if (of_one := device.total_bytes()) is None:
        return
    there = of_one * config.trainer.nodes * (1 if device.count() is None else config.trainer.devices)
    parameters = cost.parameters(model).total
    logits = config.data.batch // config.trainer.accumulate * config.data.length * model.vocabulary
    needed = 16 * parameters + 4 * logits  # fp32 weights, gradients, Adam's two moments; then the largest activation
    if needed > there:
        raise BadInput(
            f"training {parameters:,} parameters with data.batch={config.data.batch} takes {size(needed)} at least, "
            f"and here are {size(there)}: choose a smaller model.width, model.layers or data.batch"
        )


def train(config: TrainConfig) -> None:
    """Of several processes only rank 0 shows, tracks, exports, measures and reports; the others train with it."""
    console = Console(quiet=rank() > 0)
    device = best_device(config.trainer.accelerator).where
    refuse_what_cannot_be_shared(config)
    precision, why = precision_of(config.precision, device)
    checkpoint = to_resume(config, console)
    if checkpoint is not None:
        config = dataclasses.replace(config, run_dir=str(checkpoint.parent.parent))
        refuse_another(config)
    pretrained = Path(str(config.model.path)) if config.model.source == "hf" else None
    tokenizer = load_tokenizer(pretrained) if pretrained else None
    corpus = prepare(config.data, tokenizer, seed=config.seed)
    if tokenizer is not None:  # a corpus kept from before may know another chat template or fewer ends
        corpus = dataclasses.replace(corpus, tokenizer=tokenizer)
    if checkpoint is not None:
        refuse_other_tokens(checkpoint, corpus.tokenizer)
    for line in corpus.description:
        console.print(line, markup=False, highlight=False)
    seed_everything(config.seed, verbose=False)
    model = fresh_or_loaded(config, corpus, DTYPES[precision])
    if rank() > 0:
        fit(config, model, corpus, Path(config.run_dir), checkpoint, console)
        return
    with claim(config, resuming=checkpoint is not None) as run_dir:
        parameters = sum(p.numel() for p in model.parameters())
        say(console, f"{parameters:,} parameters in {precision} ({why})")
        say(console, f"everything goes to {run_dir}")
        with tracker_of(config, run_dir, console, "train") as tracker:
            with followers(config, checkpoint, train):
                module, stopped = fit(config, model, corpus, run_dir, checkpoint, console, tracker)
            if stopped is not None:
                how = f"go on with: {call('train')} trainer.resume={run_dir}"
                raise Stopped(stopped, f"stopped after step {module.global_step}; {how}")
            exported = export(module.model.cpu(), run_dir / "export", tokenizer=corpus.tokenizer)
            tracker.export(exported, fingerprint_of(exported))
        finish(config, module, corpus, run_dir, console)


def finish(config: TrainConfig, module: LitGPT, corpus: Corpus, run_dir: Path, console: Console) -> None:
    """The weights' other life: exported, proven the same, measured beside training, and heard."""
    model, exported = module.model, run_dir / "export"
    served = load(exported)
    tokens = torch.from_numpy(np.asarray(corpus.validation[: config.data.length], dtype=np.int64))[None]
    if differing := differing_logits(model, served.model, tokens):
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
            precision=model.precision,
            device=str(best_device(config.trainer.accelerator).where),  # Lightning has moved the module from there
            threads=torch.get_num_threads(),
            seed=config.seed,
            optim=config.optim,
            measure=config.measure,
        )
        say(console, f"measuring both lives{at_most(config.measure)}")
        measure_both_lives(with_kernels(case), results, command_line())
    prompt = askable(config.sample_prompt, corpus)
    sample = harmless(prompt + str(served.generate(prompt, max_new_tokens=100, seed=config.seed)))
    loss = float(module.trainer.callback_metrics.get("validation_loss", math.nan))
    describe(config, model, corpus, run_dir, loss, [prompt, sample])
    if config.measure.enabled:
        conclude(config, run_dir, console, job_type="inference", sample=sample)
    else:
        say(console, f"\n{sample}\n")
    say(console, lesson_of(run_dir))
    latest = run_dir.parent / "latest"
    waiting = latest.with_name(f".latest-{os.getpid()}")
    waiting.symlink_to(run_dir.name)
    waiting.replace(latest)
    say(console, f"text     {call('generate')} checkpoint={run_dir} prompt={prompt!r}")


def lesson_of(run_dir: Path) -> str:
    """The line that says where the lesson is, or why a model like this has none: no reason for a run to fail."""
    try:
        return f"lesson   {write_lesson(run_dir)}"
    except BadInput as refusal:
        return f"lesson   none: {refusal}"


def askable(prompt: str, corpus: Corpus) -> str:
    """The prompt, or none where a tokenizer of single characters has never met it: training is done by then."""
    try:
        corpus.tokenizer.encode(prompt)
    except BadInput:
        return ""
    return prompt


def describe(config: TrainConfig, model: GPT, corpus: Corpus, run_dir: Path, loss: float, said: list[str]) -> None:
    """The export's card: its weights, their training, what the run measured, and a sample."""
    data, plan = config.data, config.trainer
    facts = {
        "from": f"{config.model.path}" if config.model.source == "hf" else "fresh weights",
        "text": " ".join(corpus.description[:1]),
        "steps": f"{plan.max_steps:,} of {data.batch} x {data.length} tokens",
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "validation loss": f"{loss:.3f} nats a token",
        "seed": config.seed,
    }
    manifest = read_manifest(run_dir / "export")
    assert manifest is not None
    sections = [weights_section(model, manifest), about_training(facts)]
    if config.measure.enabled:
        results = read(run_dir / "results.jsonl")
        (where, *_) = results.environments.values()
        sections.append(about_costs(compare(results), where.identity))
    write_card(run_dir / "export", [*sections, about_text(*said)])


def fit(
    config: TrainConfig,
    model: GPT,
    corpus: Corpus,
    run_dir: Path,
    checkpoint: Path | None,
    console: Console,
    tracker: Tracker | None = None,
) -> tuple[LitGPT, int | None]:
    """The trained module and the signal that ended it early. Without a tracker this is a rank that leaves no trace."""
    plan = config.trainer
    share = (rank(), plan.devices * plan.nodes)
    together = config.data.batch // (plan.accumulate * share[1])
    choose_backward(model, best_device(plan.accelerator).where, batch=together, length=config.data.length)
    if config.compile:
        model.compile_blocks()
    module = LitGPT(model, config.optim, plan, seed=config.seed)
    validate_every = min(plan.validate_every, plan.max_steps)
    signals = StopOnSignal(validate_every)
    watch = Watch(
        console,
        tokens_per_step=config.data.batch * config.data.length,
        bytes_per_token=corpus.bytes_per_token,
        live=plan.progress,
    )
    checkpoints = run_dir / "checkpoints"
    callbacks: list[Callback] = []
    if tracker is not None:
        corpus.tokenizer.save(checkpoints / "tokenizer.json")
        callbacks = [watch, Track(tracker, config, module)]
        if plan.profiler is not None:
            callbacks.append(Trace(run_dir / "trace.json"))
    if plan.early_stopping is not None:
        callbacks.append(EarlyStopping("validation_loss", patience=plan.early_stopping))
    callbacks += [signals, KeepBest(checkpoints), KeepLast(checkpoints, plan.checkpoint_every, validate_every)]
    quieten()
    keep_freed_pages()
    trainer = Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        num_nodes=plan.nodes,
        strategy=strategy_of(config),
        max_steps=plan.max_steps,
        max_time=plan.max_time,
        max_epochs=-1,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        limit_val_batches=plan.validation_batches,
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
    loader = DataLoader(
        TrainingBatches(
            corpus.train,
            seed=config.seed,
            batch=data.batch,
            length=data.length,
            steps=plan.max_steps,
            start=0
            if checkpoint is None
            else checkpoint_file.load(checkpoint, only=("global_step",)).get("global_step", 0),
            shard=share,
        ),
        batch_size=None,
        num_workers=data.workers,
    )
    held_out = ValidationBatches(corpus.validation, batch=data.batch, length=data.length, shard=share)
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
    if plan.strategy == "fsdp" or config.compile:
        module.model = whole(module.model)
    say(console, f"trained in {time.monotonic() - started:.0f} s")
    return module, signals.received
