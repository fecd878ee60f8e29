"""What do fp32, bf16 and int8 cost in training and in inference, and what do they cost in quality?

    python experiments/precision.py checkpoint=runs/latest

The same weights in each precision. The loss on validation text stands beside every cost. Nothing is trained in int8.

:chapter: Serving
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import DataConfig, ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.estimates import ratio
from isoforward.base.results import Results, Row
from isoforward.data.batches import ValidationBatches
from isoforward.data.corpus import prepare
from isoforward.formats.export import freeze, load_tokenizer
from isoforward.measure.case import Case, Laps, batch_of, identity_row, master_of, record, row, timed
from isoforward.measure.train_and_serve import by_name, serving_candidates, training_candidates
from isoforward.model.gpt import GPT
from isoforward.model.loss import next_token_loss
from isoforward.serve.inference import DTYPES
from isoforward.serve.quantised import quantise, refuse_unquantisable
from isoforward.show.compare import only

WAYS = ("fp32", "bf16", "int8")
SERVING = {"frozen": ("forward", "step"), "prefill": ("prefill", "sequence"), "decode": ("decode", "token")}
HELD_OUT = 8  # batches of validation text


def case_in(case: Case, way: str) -> Case:
    if way == "int8":  # weights are rounded from fp32, and the forward is another
        return dataclasses.replace(case, precision="fp32", labels={"dtype": "int8", "forward": "int8"})
    return dataclasses.replace(case, precision=way)


def served(case: Case, way: str, master: GPT) -> GPT:
    return quantise(freeze(master)) if way == "int8" else freeze(master, dtype=DTYPES[way])


@torch.inference_mode()
def loss_of(model: GPT, batches: list) -> float:
    """Nats a token, of text that training never saw."""
    return sum(float(next_token_loss(model(x), y)) for x, y in batches) / len(batches)


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    data = DataConfig(**packed["data"])
    corpus = prepare(data, load_tokenizer(Path(str(case.export))), seed=case.seed)
    held_out = ValidationBatches(corpus.validation, batch=case.batch, length=case.length)
    text = [held_out[k] for k in range(min(HELD_OUT, len(held_out)))]
    tokens, targets = batch_of(case)
    candidates: dict[str, Callable[[], dict[str, float]]] = {}
    first: list[Row] = []
    for way in WAYS:
        own = case_in(case, way)
        master = master_of(own)
        frozen = served(own, way, master)
        same = identity_row(own, master, frozen, tokens[:1])
        first.append(dataclasses.replace(same, quantity="difference") if way == "int8" else same)
        serving = serving_candidates(own, frozen, tokens)
        candidates |= {f"{way} frozen": serving["frozen"], f"{way} generation": serving["generation"]}
        about = {"life": "inference", "phase": "forward", "quantity": "loss", "unit": "nat", "per": "token"}
        first.append(row(own, **about, value=loss_of(frozen, text), conditions=own.conditions(text=corpus.hash[:12])))
        if way == "int8":
            about = {"life": "training", "phase": "step", "quantity": "time", "unit": "s", "per": "step"}
            why = "int8 has no gradient: weights are rounded when training is over"
            first.append(row(own, **about, value=None, provenance="unavailable", reason=why, conditions=own.training()))
        else:
            candidates[f"{way} whole"] = training_candidates(own, master, tokens, targets)["whole"]

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        yield from first
        for way in WAYS:
            own = case_in(case, way)
            samples = by_name({name: rounds for name, rounds in laps.items() if name.startswith(f"{way} ")})
            if "whole" in samples:
                at = {"life": "training", "phase": "step", "per": "step", "conditions": own.training()}
                yield row(own, **at, **timed(samples["whole"]))
            for name, (phase, per) in SERVING.items():
                executions = case.new_tokens - 1 if phase == "decode" else 1
                at = {
                    "life": "inference",
                    "phase": phase,
                    "per": per,
                    "conditions": own.conditions(executions=executions),
                }
                yield row(own, **at, **timed(samples[name]))

    return record(packed, candidates, tell)


def answer(results: Results) -> str:
    told = []
    exact = only(results, quantity="loss", dtype="fp32").value
    for way in WAYS[1:]:
        parts = []
        for life, phase in (("training", "step"), ("inference", "prefill"), ("inference", "decode")):
            mine, base = (only(results, quantity="time", life=life, phase=phase, dtype=d) for d in (way, "fp32"))
            if mine.value is not None:
                parts.append(
                    f"{life if phase == 'step' else phase} {units.times(ratio(mine.samples, base.samples).value)}"
                )
        loss = only(results, quantity="loss", dtype=way).value
        told.append(f"{way} takes {', '.join(parts)} and changes the loss by {loss - exact:+.4f} nat")
    return f"Against fp32, whose validation loss is {exact:.4f}: {'; '.join(told)}."


def main(config: ExperimentConfig) -> None:
    if config.checkpoint is None:
        raise BadInput("checkpoint is not set: quality is that of trained weights; write checkpoint=runs/latest")
    refuse_unquantisable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = dataclasses.replace(config, precision="fp32")
    ask(config, "precision", "precision:measure", answer, data=dataclasses.asdict(config.data))


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
