"""How does decoding turn from bandwidth-bound to compute-bound as the batch grows?

    python experiments/decode_batch.py
    python experiments/decode_batch.py model=gpt2 batches=[1,4,16,64] measure.repeats=5

A decode step at every batch size runs in turns with a plain read of the same weights and with training's forward.

:chapter: Serving
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, at_least
from isoforward.base.errors import BadInput
from isoforward.base.estimates import ratio
from isoforward.base.results import Results, Row
from isoforward.formats.export import freeze
from isoforward.measure import flops as counting
from isoforward.measure.case import Case, Laps, batch_of, identity_row, master_of, record, row, spent, timed
from isoforward.model import footprint, steps
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import room_for
from isoforward.show.compare import only, select

ENOUGH_S = 0.02  # that a sample lasts at least, or about


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBatch(ExperimentConfig):
    batches: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128])

    def __post_init__(self) -> None:
        super().__post_init__()
        for batch in self.batches:
            at_least("batches", batch, 1)
        if len(set(self.batches)) < 2:
            raise BadInput(f"batches={self.batches} must be two or more that differ")


def decoding(case: Case, frozen: GPT, batch: int) -> Callable[[], dict[str, float]]:
    """Seconds of a step in which each of `batch` sequences, `prompt` tokens long, gains one token."""
    cache = room_for(frozen, batch=batch, capacity=case.prompt + 1)
    cache.fill(0)
    token = torch.zeros(batch, 1, dtype=torch.long, device=case.device)

    def step() -> None:
        cache.length = case.prompt
        steps.decode(frozen, token, cache)

    step()
    repeats = max(1, round(ENOUGH_S / spent(case, step)))

    def burst() -> None:
        for _ in range(repeats):
            step()

    return lambda: {"s": spent(case, burst) / repeats}


def measure(packed: dict) -> str:
    case, batches = Case.unpack(packed["case"]), packed["batches"]
    master = master_of(case)
    frozen = freeze(master)
    tokens, _ = batch_of(case)
    matrices = [p for name, p in frozen.named_parameters() if p.dim() == 2 and not name.startswith("positions")]

    @torch.inference_mode()
    def read() -> None:
        for matrix in matrices:
            matrix.sum()

    candidates = {f"{batch}": decoding(case, frozen, batch) for batch in batches}
    candidates["forward"] = lambda: {"s": spent(case, lambda: master(tokens))}
    candidates["read"] = lambda: {"s": spent(case, read)}
    identity = identity_row(case, master, frozen, tokens[:1])

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        samples = {name: [lap["s"] for lap in rounds] for name, rounds in laps.items()}
        yield identity
        at = {"life": "training", "phase": "forward", "per": "step", "conditions": case.training()}
        yield row(case, **at, **timed(samples["forward"]))
        bytes_read = float(sum(matrix.nbytes for matrix in matrices))
        at = {"life": "inference", "phase": "run", "per": "run"}
        conditions = case.conditions(kernel="plain read of the weights", bytes=bytes_read)
        yield row(case, **at, **timed(samples["read"]), conditions=conditions)
        for batch in batches:
            conditions = case.conditions(batch=batch, tokens=batch, context=case.prompt + 1, cache=True)
            at = {"life": "inference", "phase": "decode", "per": "step", "conditions": conditions}
            yield row(case, **at, **timed(samples[f"{batch}"]))
            flops = counting.count_decode(case.model, batch=batch, cached=case.prompt)
            about = {"quantity": "flops", "unit": "flop", "provenance": "counted", "convention": "model"}
            yield row(case, **at, **about, value=float(flops))
            traffic = footprint.inference_bytes(case.model, batch=batch, cached=case.prompt, dtype=case.precision)
            about = {"quantity": "bytes", "unit": "byte", "provenance": "predicted"}
            yield row(case, **at, **about, value=float(traffic.total))

    return record(packed, candidates, tell)


def answer(results: Results) -> str:
    forward = only(results, life="training", phase="forward")
    read = only(results, kernel="plain read of the weights")
    steps_of = {int(one.conditions["batch"]): one for one in select(results, phase="decode", quantity="time")}
    batches = sorted(steps_of)
    first, last = batches[0], batches[-1]
    plain = read.conditions["bytes"] / read.value
    moved = only(results, phase="decode", quantity="bytes", batch=first).value
    share = moved / plain / steps_of[first].value
    rates = {batch: batch / steps_of[batch].value for batch in batches}
    best = max(batches, key=rates.__getitem__)
    forward_s = [s / forward.conditions["tokens"] for s in forward.samples]
    against = {batch: ratio([s / batch for s in steps_of[batch].samples], forward_s) for batch in batches}
    level = [batch for batch in batches if against[batch].low <= 1]
    return (
        f"A batch of {first} decodes {units.digits(rates[first])} tokens/s, at {share:.0%} of the bandwidth of a plain "
        f"read; throughput rises to {units.digits(rates[best])} at {best}. A token decoded alone costs "
        f"{units.times(against[first].value)} one of training's forward, in a batch of {last} "
        f"{units.times(against[last].value)}"
        + (f"; from a batch of {level[0]} on it is no dearer." if level else "; no batch here makes them equal.")
    )


def main(config: DecodeBatch) -> None:
    ask(config, "decode_batch", "decode_batch:measure", answer, batches=config.batches)


if __name__ == "__main__":
    sys.exit(run(main, DecodeBatch))
