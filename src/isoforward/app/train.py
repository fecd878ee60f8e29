"""What `python train.py` does: train, freeze and export, serve, compare both lives, report."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything
from rich.console import Console

from isoforward.app.question import at_most, configured, fitting, precision_of
from isoforward.app.resuming import as_it_began
from isoforward.app.run_directory import claim
from isoforward.app.telling import call, command_line, conclude, fingerprint_of, tracker_of
from isoforward.base.config import ModelConfig, TrainConfig
from isoforward.base.device import best_device
from isoforward.base.environment import environment as environment_of
from isoforward.base.errors import BadInput, Integrity, Stopped
from isoforward.base.memory_readers import held_bytes
from isoforward.base.results import Row, read, write
from isoforward.base.storage import TIME_IS_UP, remove, write_text
from isoforward.base.terminal import say
from isoforward.base.units import size
from isoforward.data.corpus import Corpus, prepare
from isoforward.formats.adapter_format import save_adapter
from isoforward.formats.export import export, merged
from isoforward.formats.loading import find, load_tokenizer, load_trainable, read_manifest
from isoforward.formats.model_card import about_weights, write_card
from isoforward.formats.untrusted import harmless
from isoforward.lesson.page import write_lesson
from isoforward.measure.both_lives import measure_both_lives
from isoforward.measure.case import differing_logits, with_kernels
from isoforward.measure.mismatch import closeness
from isoforward.model import cost
from isoforward.model.adapter_cost import trained_parameters
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT
from isoforward.serve.inference import DTYPES, load
from isoforward.show.compare import compare
from isoforward.show.model_card import about_costs, about_text, about_training
from isoforward.train.distributed import followers, rank, refuse_what_cannot_be_shared
from isoforward.train.fit import TIME, fit
from isoforward.train.lightning_module import LitGPT
from isoforward.train.outcome import Outcome
from isoforward.train.stopping import refuse_another, refuse_finished, refuse_other_tokens, to_resume


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
        raise BadInput("model=transformers is measured, not trained; write model=hf for the families of model.family")
    if config.model.vocab is not None and config.model.vocab < tokens:
        raise BadInput(f"model.vocab={config.model.vocab} is smaller than the tokenizer's {tokens}; leave it out")
    fresh = dataclasses.replace(config.model, vocab=config.model.vocab or tokens)
    refuse_beyond_memory(config, fresh)
    return GPT(fresh, dtype=dtype, checkpointing=config.trainer.checkpointing)


def least_of(config: TrainConfig) -> ModelConfig:
    """The model as far as it is known before there is a tokenizer: one token is the least of all vocabularies."""
    if config.model.source == "hf":
        return find(Path(str(config.model.path)), verify=False).config
    return dataclasses.replace(config.model, vocab=config.model.vocab or 1)


def with_what_is_loaded(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """What of a preset a checkpoint leaves unread would be written down as what was trained."""
    path = config.model.path
    sizes = dataclasses.replace(model, source="hf", path=path)
    return dataclasses.replace(config, model=sizes, data=dataclasses.replace(config.data, tokenizer=str(path)))


def refuse_beyond_memory(config: TrainConfig, model: ModelConfig) -> None:
    """Told in a second, where the system would take minutes to end the program without a word."""
    device = best_device(config.trainer.accelerator)
    trained = trained_parameters(model, config.adapter)  # refuses targets that are not there
    if (of_one := device.total_bytes()) is None:
        return
    on_gpu = device.count() is not None
    there = of_one * config.trainer.nodes * (config.trainer.devices if on_gpu else 1)
    parameters = cost.parameters(model).total
    length = min(config.data.length, model.context)
    logits = config.data.batch // config.trainer.accumulate * length * model.vocabulary
    needed = 4 * parameters + 12 * trained  # fp32 weights; gradients, Adam's two moments
    needed += 4 * logits  # the largest activation
    needed += 0 if on_gpu else held_bytes()
    if needed > there:
        raise BadInput(
            f"training {parameters:,} parameters with data.batch={config.data.batch} takes {size(needed)} at least, "
            f"and here are {size(there)}: choose a smaller model.width, model.layers or data.batch"
        )


def train(config: TrainConfig) -> None:
    """Of several processes only rank 0 shows, tracks, exports, measures and reports; the others train with it."""
    console = Console(quiet=rank() > 0)
    checkpoint = to_resume(config, console)
    if checkpoint is not None:
        config = as_it_began(dataclasses.replace(config, run_dir=str(checkpoint.parent.parent)))
        refuse_another(config)
        refuse_finished(checkpoint, config)
    device = best_device(config.trainer.accelerator).where
    refuse_what_cannot_be_shared(config)
    least = config.model
    if config.model.source != "transformers":
        least = least_of(config)
        refuse_beyond_memory(config, least)  # before the text is prepared, which can take its time
    if config.model.source == "hf":
        config = with_what_is_loaded(config, least)
    elif config.model.vocab is None:
        least = dataclasses.replace(least, vocab=config.data.vocab)  # what a tokenizer will have, or nearly so
    precision, why = precision_of(config, least, device)
    pretrained = Path(str(config.model.path)) if config.model.source == "hf" else None
    tokenizer = load_tokenizer(pretrained) if pretrained else None
    corpus = prepare(config.data, tokenizer, seed=config.seed)
    if tokenizer is not None:  # a corpus kept from before may know another chat template or fewer ends
        corpus = dataclasses.replace(corpus, tokenizer=tokenizer)
    if checkpoint is not None:
        refuse_other_tokens(checkpoint, corpus.tokenizer)
    for line in corpus.description:
        say(console, line)
    seed_everything(config.seed, verbose=False)
    model = adapt(fresh_or_loaded(config, corpus, DTYPES[precision]), config.adapter)
    if rank() > 0:
        fit(config, model, corpus, Path(config.run_dir), checkpoint, console)
        return
    with claim(config, resuming=checkpoint is not None) as run_dir:
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        only = f", {trained:,} of them trained" if trained < parameters else ""
        say(console, f"{parameters:,} parameters{only} in {precision} ({why})")
        say(console, f"everything goes to {run_dir}")
        with tracker_of(config, run_dir, console, "train") as tracker:
            remove(run_dir / TIME_IS_UP)
            with followers(config, checkpoint, train):
                module, outcome, stopped = fit(config, model, corpus, run_dir, checkpoint, console, tracker)
            how = f"go on with: {call('train')} {shlex.quote(f'trainer.resume={run_dir}')}"
            if stopped is not None:
                raise Stopped(stopped, f"stopped after step {outcome.steps}; {how}")
            if outcome.ended_by == TIME:
                say(console, f"trainer.max_time is up; {how}")
                write_text(run_dir / TIME_IS_UP, "")
            exported = export(module.model.cpu(), run_dir / "export", tokenizer=corpus.tokenizer)
            if module.model.adapter.name == "lora":
                save_adapter(module.model, run_dir / "adapter")
            tracker.outcome(outcome.numbers())
            tracker.export(exported, fingerprint_of(exported))
        finish(config, module, outcome, corpus, run_dir, console)


def finish(
    config: TrainConfig, module: LitGPT, outcome: Outcome, corpus: Corpus, run_dir: Path, console: Console
) -> None:
    """The weights' other life: exported, proven the same, measured beside training, and heard."""
    model, exported = merged(module.model), run_dir / "export"
    served = load(exported, kernels="reference")
    tokens = torch.from_numpy(np.asarray(corpus.validation[: config.data.length], dtype=np.int64))[None]
    if differing := differing_logits(model, served.model, tokens):
        raise Integrity(f"{exported}: {differing} logits of the frozen forward differ from those of training's forward")
    say(console, f"exported to {exported}: the frozen forward gives training's logits, bit for bit")
    if model is not module.model:
        with torch.inference_mode():
            moved = float((module.model.eval()(tokens) - model.eval()(tokens)).abs().max())
        say(console, f"its adapter is merged there, which moved logits by {moved:.1e} at most")
        say(console, f"the adapter alone is in {run_dir / 'adapter'}")
    device = best_device(config.trainer.accelerator).where  # Lightning has moved the module from there
    results = run_dir / "results.jsonl"
    results.unlink(missing_ok=True)  # of an attempt that did not finish
    beside: list[Row] = []
    if config.measure.enabled:
        case = dataclasses.replace(
            configured(config, "train", model.config, export=str(exported), precision=model.precision, device=device),
            accumulate=config.trainer.accumulate,
            checkpointing=config.trainer.checkpointing,
            adapter=config.adapter,
        )
        say(console, f"measuring both lives{at_most(config.measure)}")
        measure_both_lives(with_kernels(case), results, command_line())
        beside = closeness(case, model, served.model, tokens[0].tolist())
    known = read(results).environments if results.exists() else {}
    where = next(iter(known.values()), None) or environment_of(command_line(), device)
    write(results, [*([] if known else [where]), *outcome.rows(where.id, text=corpus.hash[:12])])
    write(results, [dataclasses.replace(row, environment=where.id) for row in beside])
    prompt = askable(config.sample_prompt, corpus)
    sample = harmless(prompt + str(served.generate(prompt, max_new_tokens=100, seed=config.seed)))
    describe(config, model, outcome, corpus, run_dir, [prompt, sample])
    if config.measure.enabled:
        conclude(config, run_dir, console, job_type="inference", sample=sample)
    else:
        say(console, f"\n{sample}\n")
    say(console, lesson_of(run_dir))
    point_latest(run_dir, console)
    checkpoint = shlex.quote(f"checkpoint={run_dir}")
    say(console, f"text     {call('generate')} {checkpoint} prompt={shlex.quote(prompt)}")


def lesson_of(run_dir: Path) -> str:
    """The line that says where the lesson is, or why a model like this has none: no reason for a run to fail."""
    try:
        return f"lesson   {write_lesson(run_dir)}"
    except BadInput as refusal:
        return f"lesson   none: {refusal}"


def point_latest(run_dir: Path, console: Console) -> None:
    """runs/latest is the newest run that finished; some drives have no links, and a run is none the worse for it."""
    whole = run_dir.resolve()
    latest, waiting = whole.parent / "latest", whole.parent / f".latest-{os.getpid()}"
    try:
        if latest.exists() and not latest.is_symlink():
            raise FileExistsError(errno.EEXIST, "something else is there")
        waiting.symlink_to(whole.name)
        waiting.replace(latest)
    except OSError as error:
        with suppress(OSError):
            waiting.unlink()
        say(console, f"{latest} was not made ({error.strerror}): name the run, checkpoint={run_dir}")


def askable(prompt: str, corpus: Corpus) -> str:
    """The prompt, or none where a tokenizer of single characters has never met it: training is done by then."""
    try:
        corpus.tokenizer.encode(prompt)
    except BadInput:
        return ""
    return prompt


def describe(config: TrainConfig, model: GPT, outcome: Outcome, corpus: Corpus, run_dir: Path, said: list[str]) -> None:
    """The export's card: its weights, their training, what the run measured, and a sample."""
    data = config.data
    facts = {
        "from": f"{config.model.path}" if config.model.source == "hf" else "fresh weights",
        "text": " ".join(corpus.description[:1]),
        "steps": f"{outcome.told_steps()}; a step is {data.batch} x {data.length} tokens",
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "validation loss": f"{outcome.told_loss()}, on {outcome.judged_tokens:,} tokens held out",
        "seed": config.seed,
    }
    manifest = read_manifest(run_dir / "export")
    assert manifest is not None
    sections = [about_weights(model.config, manifest), about_training(facts)]
    if config.measure.enabled:
        results = read(run_dir / "results.jsonl")
        (where, *_) = results.environments.values()
        sections.append(about_costs(compare(results), where.identity))
    write_card(run_dir / "export", [*sections, about_text(*said)])
