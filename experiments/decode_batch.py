"""How does decoding turn from bandwidth-bound to compute-bound as the batch grows?

    python experiments/decode_batch.py
    python experiments/decode_batch.py model=gpt2 batches=[1,4,16,64] measure.budget=20

A decode step at every batch size runs in turns with a plain read of the same weights and with training's forward.

:chapter: Serving
:unread: measure.context measure.energy measure.new_tokens optim.beta1 optim.beta2 optim.clip optim.lr optim.min_lr
optim.momentum optim.muon_lr optim.schedule optim.warmup_steps optim.weight_decay
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.checks import at_least
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, only, select
from isoforward.measure import flops
from isoforward.measure.benchmark import Measured, Part, Work, timed
from isoforward.measure.case import Case, batch_of, counted, frozen_of, identity_row, master_of
from isoforward.measure.passes import Bench
from isoforward.model import footprint, steps
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import room_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBatch(ExperimentConfig):
    batches: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128])

    def __post_init__(self) -> None:
        super().__post_init__()
        for batch in self.batches:
            at_least("batches", batch, 1)
        if len(set(self.batches)) < 2:
            raise BadInput(f"batches={self.batches} must be two or more that differ")


def decoding(case: Case, frozen: GPT, batch: int) -> Work:
    """A step in which each of `batch` sequences, `prompt` tokens long, gains one token."""
    cache = room_for(frozen, batch=batch, capacity=case.prompt + 1)
    cache.fill(0)
    token = torch.zeros(batch, 1, dtype=torch.long, device=case.device)

    def step() -> None:
        cache.rewind(case.prompt)
        steps.decode(frozen, token, cache)

    own = case.decode_kernels(batch)
    conditions = case.conditions(batch=batch, tokens=batch, context=case.prompt + 1, cache=True, **own)
    return timed(case.clock, Part(life="inference", phase="decode", per="step", conditions=conditions), step)


def bench(case: Case, batches: Sequence[int]) -> Bench:
    master = master_of(case)
    frozen = frozen_of(case, master)
    tokens, _ = batch_of(case)
    matrices = [p for name, p in frozen.named_parameters() if p.dim() == 2 and not name.startswith("positions")]
    bytes_read = float(sum(matrix.nbytes for matrix in matrices))
    identity = identity_row(case, master, frozen, tokens[:1])

    @torch.inference_mode()
    def read() -> None:
        for matrix in matrices:
            matrix.sum()

    conditions = case.conditions(kernel="plain read of the weights", bytes=bytes_read)
    reading = timed(case.clock, Part(life="inference", phase="run", per="run", conditions=conditions), read)
    forward = timed(case.clock, case.step("forward"), lambda: master(tokens))
    decodes = [decoding(case, frozen, batch) for batch in batches]
    pairs = [(decode.part, forward.part) for decode in decodes] + [(decodes[0].part, reading.part)]

    def rows(measured: Measured) -> Iterator[Row]:
        yield identity
        for batch, decode in zip(batches, decodes, strict=True):
            about = decode.part.about
            yield case.row(about, counted(flops.count_decode(case.model, batch=batch, cached=case.prompt)))
            moved = footprint.inference_bytes(case.model, batch=batch, cached=case.prompt, dtype=case.precision)
            yield case.row(about, quantity="bytes", provenance="predicted", value=float(moved.total))

    return Bench(works=[forward, reading, *decodes], pairs=pairs, rows=rows)


def answer(results: Results) -> str:
    forward = only(results, life="training", phase="forward", quantity="time")
    read = only(results, kernel="plain read of the weights")
    steps_of = {int(one.setting("batch")): one for one in select(results, phase="decode", quantity="time")}
    batches = sorted(steps_of)
    first, last = batches[0], batches[-1]
    plain = read.setting("bytes") / read.number
    moved = only(results, phase="decode", quantity="bytes", batch=first).number
    share = moved / plain / steps_of[first].number
    rates = {batch: batch / steps_of[batch].number for batch in batches}
    best = max(batches, key=rates.__getitem__)
    tokens = forward.setting("tokens")
    against = {}  # of a token: a step of `batch` tokens against a forward of so many more
    for batch in batches:
        found = results.judge(steps_of[batch], forward).ratio
        against[batch] = [each * tokens / batch for each in (found.value, found.low)]
    level = [batch for batch in batches if against[batch][1] <= 1]
    return (
        f"A batch of {first} decodes {units.digits(rates[first])} tokens/s, at {share:.0%} of the bandwidth of a plain "
        f"read; throughput rises to {units.digits(rates[best])} at {best}. A token decoded alone costs "
        f"{units.times(against[first][0])} one of training's forward, in a batch of {last} "
        f"{units.times(against[last][0])}"
        + (f"; from a batch of {level[0]} on it is no dearer." if level else "; no batch here makes them equal.")
    )


def main(config: DecodeBatch) -> None:
    ask(config, "decode_batch", bench, answer, config.batches, rows=config.batches)


if __name__ == "__main__":
    sys.exit(run(main, DecodeBatch))
