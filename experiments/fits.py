"""Does what a plan says fits really fit into that much memory, and does what it says does not fit really fail?

    python experiments/fits.py
    python experiments/fits.py transformers=false only=llama

Each model is planned, then trained for two steps in processes of its own. One has no limit, and its peak is read. One
may map the plan's upper end and no more (RLIMIT_AS), and must finish. One may map the lower end, and must run out of
memory. Six architectures are those of Transformers as they are, without weights from anywhere.

:chapter: Trust
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isoforward.app.command_line import run
from isoforward.app.question import asking
from isoforward.base.config import ModelConfig, OptimConfig, TrackingConfig
from isoforward.base.device import device_of
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, Verdict, only, row_of, select, unavailable
from isoforward.base.subprocesses import Failed, bound_memory, run_isolated
from isoforward.measure.memory import HONEST_MALLOC, PeakOf, rehearse
from isoforward.model import steps
from isoforward.model.gpt import GPT
from isoforward.model.optim import build
from isoforward.plan.planning import peak
from isoforward.plan.subject import Known, Setup
from isoforward.serve.inference import DTYPES

TRIES_S = 300.0
# family, layers, width, heads, kv_heads, vocab, and how each is trained
OURS: tuple[tuple[str, int, int, int, int, int, dict[str, Any]], ...] = (
    ("gpt2", 4, 384, 6, 6, 8192, {"batch": 4, "length": 256}),
    ("gpt2", 6, 256, 4, 4, 4096, {"batch": 8, "length": 256, "precision": "bf16"}),
    ("gpt2", 8, 256, 4, 4, 2048, {"batch": 16, "length": 256, "checkpointing": "full"}),
    ("gpt2", 2, 768, 12, 12, 16384, {"batch": 2, "length": 128, "optimizer": "momentum"}),
    ("gpt2", 4, 512, 8, 8, 8192, {"batch": 8, "length": 256, "accumulate": 4}),
    ("llama", 4, 384, 6, 2, 8192, {"batch": 4, "length": 256}),
    ("llama", 6, 320, 5, 5, 4096, {"batch": 4, "length": 384, "precision": "bf16"}),
    ("llama", 4, 512, 8, 4, 16384, {"batch": 4, "length": 256, "checkpointing": "full"}),
    ("qwen2", 4, 384, 6, 2, 8192, {"batch": 6, "length": 192}),
    ("qwen3", 4, 384, 6, 3, 8192, {"batch": 4, "length": 256, "checkpointing": "selective"}),
    ("mistral", 3, 640, 10, 2, 8192, {"batch": 2, "length": 256, "optimizer": "sgd"}),
    ("gemma", 3, 512, 4, 1, 16384, {"batch": 2, "length": 256}),
    ("olmo2", 5, 320, 5, 5, 8192, {"batch": 6, "length": 192, "optimizer": "adam"}),
    ("smollm", 6, 384, 6, 3, 8192, {"batch": 3, "length": 320}),
)
SIZES = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 8192}
THEIRS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (  # config.json, and how each is trained
    ({"model_type": "gpt2", "n_embd": 384, "n_layer": 4, "n_head": 6, "vocab_size": 8192, "attn_pdrop": 0.0}, {}),
    ({"model_type": "llama", **SIZES, "intermediate_size": 1024, "num_key_value_heads": 2}, {"batch": 8}),
    ({"model_type": "gpt_neox", **SIZES, "intermediate_size": 1536}, {"optimizer": "momentum"}),
    ({"model_type": "opt", **SIZES, "ffn_dim": 1536, "word_embed_proj_dim": 384}, {}),
    ({"model_type": "phi", **SIZES, "intermediate_size": 1536}, {"batch": 8, "accumulate": 2}),
    ({"model_type": "falcon", **SIZES, "num_kv_heads": 1}, {}),
    ({"model_type": "olmo2", **SIZES, "intermediate_size": 1024}, {"checkpointing": "full"}),
    ({"model_type": "granite", **SIZES, "intermediate_size": 1024, "num_key_value_heads": 3}, {"precision": "bf16"}),
)


@dataclass(frozen=True, kw_only=True)
class Fits:
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    transformers: bool = True  # their architectures too
    only: str = ""  # models whose name holds this
    run_dir: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model, ours or by its config.json, and how it is trained."""

    name: str
    setup: Setup
    ours: ModelConfig | None = None
    theirs: str = ""  # the text of a config.json


def trials(config: Fits) -> list[Trial]:
    found = []
    for family, layers, width, heads, kv_heads, vocab, how in OURS:
        shape: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "vocab": vocab}
        made = Setup(**{"precision": "fp32", **how})
        name = f"{family} {layers} x {width}, {described(made)}"
        found.append(Trial(name=name, setup=made, ours=ModelConfig(family=family, context=512, **shape)))
    for keys, how in THEIRS if config.transformers else ():
        made = Setup(**{"precision": "fp32", "batch": 4, "length": 256, **how})
        text = json.dumps({"max_position_embeddings": 512, **keys})
        found.append(Trial(name=f"{keys['model_type']} of Transformers, {described(made)}", setup=made, theirs=text))
    chosen = [trial for trial in found if config.only in trial.name]
    if not chosen:
        raise BadInput(f"only={config.only} is in none of the names; there are {found[0].name} and the like")
    return chosen


def described(setup: Setup) -> str:
    usual = Setup(precision="fp32", batch=setup.batch, length=setup.length)
    more = [
        str(getattr(setup, each.name))
        for each in dataclasses.fields(Setup)
        if getattr(setup, each.name) != getattr(usual, each.name)
    ]
    return ", ".join([f"{setup.batch} x {setup.length}", *more])


def planned_bytes(trial: Trial) -> int:
    """In a process of its own: the meta device needs libraries that a parent with many children should not hold."""
    if trial.ours is not None:
        held = Known(trial.ours).training(trial.setup, fused_norm=False)
    else:
        from isoforward.plan.counted import Counted

        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(trial.theirs)
            held = Counted(Path(directory), most=trial.setup.micro_batch).training(trial.setup, fused_norm=False)
    return max(parts.total for parts in held.values())


def live(trial: Trial) -> tuple[Any, Any]:
    """A training that runs under a phase, as memory.rehearse takes it."""
    setup = trial.setup
    optim = {"momentum": OptimConfig(name="sgd"), "sgd": OptimConfig(name="sgd", momentum=0.0)}
    optim_config = optim.get(setup.optimizer) or OptimConfig(name=setup.optimizer)
    if trial.ours is not None:
        model: Any = GPT(trial.ours, dtype=DTYPES[setup.precision], checkpointing=setup.checkpointing)
        optimizer, vocabulary = build(model, optim_config), trial.ours.vocabulary
    else:
        from isoforward.measure.transformers_lives import optimizer_of

        model, vocabulary = theirs(trial)
        optimizer = optimizer_of(model, optim_config)
    tokens = torch.randint(vocabulary, (setup.batch, setup.length))
    step = partial(steps.train_step, model, optimizer, tokens, tokens, accumulate=setup.accumulate, clip=1.0)
    return (lambda phase: step(phase=phase)), None


def theirs(trial: Trial) -> tuple[Any, int]:
    from isoforward.serve.transformers_model import Wrapped, quiet_transformers

    transformers = quiet_transformers()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(trial.theirs)
        config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[trial.setup.precision])
    if trial.setup.checkpointing == "full":
        model.activation_checkpointing_enable()
    return Wrapped(model).train(), config.vocab_size


def small(trial: Trial) -> Trial:
    """The same work in little, which loads libraries and starts what runs beside."""
    setup = dataclasses.replace(trial.setup, batch=trial.setup.accumulate, length=16)
    if trial.ours is not None:
        shape: dict[str, Any] = {"layers": 1, "heads": 2, "kv_heads": 1, "width": 32, "ffn": None, "vocab": 64}
        return dataclasses.replace(trial, setup=setup, ours=dataclasses.replace(trial.ours, **shape))
    return dataclasses.replace(trial, setup=setup)


def measured(trial: Trial) -> int:
    """Peak bytes of the second step, above what the process holds without a model."""
    memory = device_of("cpu").memory
    rehearse(partial(live, small(trial)))
    before = memory.now()
    train, _ = live(trial)
    train(steps.unmeasured)  # Adam's state appears
    peaks = PeakOf(memory, before)
    train(peaks)
    return max(peaks.phases.values())


def limited(trial: Trial, limit: int) -> bool:
    rehearse(partial(live, small(trial)))
    bound_memory(limit)
    train, _ = live(trial)
    for _ in range(2):
        train(steps.unmeasured)
    return True


def apart(function: Any, *arguments: Any) -> Any:
    return run_isolated(function, *arguments, threads=1, env=HONEST_MALLOC, timeout_s=TRIES_S)


def rows(trial: Trial) -> Iterator[Row]:
    predicted, seen = apart(planned_bytes, trial), apart(measured, trial)
    about: RowFields = {"life": "training", "phase": "step", "per": "step"}
    at = {"layout": trial.name}
    for what in (predicted, seen):
        if isinstance(what, Failed):
            missing = unavailable(what.reason)
            yield row_of("fits", about, missing, quantity="memory", conditions=at)
            return
    yield row_of("fits", about, quantity="memory", value=float(predicted), provenance="predicted", conditions=at)
    yield row_of("fits", about, quantity="memory", value=float(seen), conditions=at)
    yield row_of("fits", about, quantity="error", value=predicted / seen - 1, conditions=at | {"of": "memory"})
    for said, limit in (("yes", peak(predicted).high), ("no", peak(predicted).low)):
        outcome = apart(limited, trial, round(limit))
        ended = "finished" if outcome is True else outcome.reason
        kept = (outcome is True) == (said == "yes")
        more = at | {"fits": said, "outcome": ended[:60]}
        yield row_of("fits", about, quantity="kept", value=float(kept), conditions=more)


def answer(results: Results) -> str:
    errors = [row.number for row in select(results, quantity="error")]
    kept = {said: select(results, quantity="kept", fits=said) for said in ("yes", "no")}
    finished, failed = (sum(row.number for row in kept[said]) for said in ("yes", "no"))
    pairs = [
        [only(results, quantity="memory", layout=layout, provenance=how).number for how in ("predicted", "measured")]
        for layout in dict.fromkeys(row.conditions["layout"] for row in select(results, quantity="error"))
    ]
    inside = sum(peak(predicted).low <= seen <= peak(predicted).high for predicted, seen in pairs)
    return (
        f"Of {len(errors)} models, {inside} held what was planned, within its interval; under a limit at its upper end "
        f"{finished:.0f} of {len(kept['yes'])} finished, and at its lower end {failed:.0f} of {len(kept['no'])} ran "
        f"out of memory; the worst error is {max(errors, key=abs):+.1%}."
    )


def main(config: Fits) -> None:
    wanted = trials(config)
    with asking(config, answer) as run:
        run.note()
        for trial in wanted:
            run.say(f"training {trial.name}")
            run.add(rows(trial))
        run.add((), Verdict(experiment="fits", trusted=True))  # memory is no time: others change nothing


if __name__ == "__main__":
    sys.exit(run(main, Fits))
