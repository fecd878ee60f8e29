"""What do fp32, bf16 and int8 cost in training and in inference, and what do they cost in quality?

    python experiments/precision.py checkpoint=runs/latest

The same weights in each precision. The loss on validation text stands beside every cost. Nothing is trained in int8.

:chapter: Serving
:unread: data.workers measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base.config import DataConfig, ExperimentConfig
from isoforward.base.device import best_device
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, only, unavailable
from isoforward.data.batches import ValidationBatches
from isoforward.data.corpus import prepare
from isoforward.formats.export import freeze
from isoforward.formats.loading import load_tokenizer
from isoforward.measure.benchmark import Work
from isoforward.measure.case import Case, batch_of, frozen_of, identity_row, master_of, with_kernels
from isoforward.measure.passes import Bench, against_first
from isoforward.measure.train_and_serve import Serving, Training
from isoforward.model.gpt import GPT
from isoforward.model.loss import next_token_loss
from isoforward.serve.quantised import quantise, refuse_unquantisable

WAYS = ("fp32", "bf16", "int8")
HELD_OUT = 8  # batches of validation text


def case_in(case: Case, way: str) -> Case:
    if way == "int8":  # weights are rounded from fp32, and the forward is another
        return dataclasses.replace(case, precision="fp32", kernels={}, labels={"dtype": "int8", "forward": "int8"})
    return with_kernels(dataclasses.replace(case, precision=way))


def served(case: Case, way: str, master: GPT) -> GPT:
    return quantise(freeze(master)) if way == "int8" else frozen_of(case, master)


@torch.inference_mode()
def loss_of(model: GPT, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Nats a token, of text that training never saw."""
    return sum(float(next_token_loss(model(x), y)) for x, y in batches) / len(batches)


def bench(case: Case, data: DataConfig) -> Bench:
    """Each way against fp32, phase by phase."""
    corpus = prepare(data, load_tokenizer(Path(str(case.export))), seed=case.seed)
    held_out = ValidationBatches(corpus.validation, batch=case.batch, length=case.length)
    text = [held_out[k] for k in range(min(HELD_OUT, len(held_out)))]
    tokens, targets = batch_of(case)
    works: list[list[Work]] = []
    first: list[Row] = []
    for way in WAYS:
        own = case_in(case, way)
        master = master_of(own)
        frozen = served(own, way, master)
        same = identity_row(own, master, frozen, tokens[:1])
        first.append(dataclasses.replace(same, quantity="difference") if way == "int8" else same)
        about: RowFields = {"life": "inference", "phase": "forward", "quantity": "loss", "per": "token"}
        first.append(own.row(about, value=loss_of(frozen, text), conditions=own.conditions(text=corpus.hash[:12])))
        serving = Serving(own, frozen, tokens)
        works.append([serving.forward, serving.generation])
        if way == "int8":
            why = "int8 has no gradient: weights are rounded when training is over"
            first.append(own.row(own.step("step").about, unavailable(why), quantity="time"))
        else:
            works[-1].append(Training(own, master, tokens, targets).whole)
    return against_first(works, rows=lambda measured: first)


def answer(results: Results) -> str:
    told = []
    exact = only(results, quantity="loss", dtype="fp32").number
    for way in WAYS[1:]:
        parts = []
        for life, phase in (("training", "step"), ("inference", "prefill"), ("inference", "decode")):
            mine, base = (only(results, quantity="time", life=life, phase=phase, dtype=d) for d in (way, "fp32"))
            if mine.value is not None:
                parts.append(f"{life if phase == 'step' else phase} {results.judge(mine, base).sentence()}")
        loss = only(results, quantity="loss", dtype=way).number
        told.append(f"{way} takes {', '.join(parts)} and changes the loss by {loss - exact:+.4f} nat")
    return f"Against fp32, whose validation loss is {exact:.4f}: {'; '.join(told)}."


def main(config: ExperimentConfig) -> None:
    if config.checkpoint is None:
        raise BadInput("checkpoint is not set: quality is that of trained weights; write checkpoint=runs/latest")
    refuse_unquantisable(best_device().where)
    config = dataclasses.replace(config, precision="fp32")
    ask(config, "precision", bench, answer, config.data)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
