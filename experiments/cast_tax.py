"""What do weight casts cost: under autocast, on the fly from fp32 weights, or done beforehand?

    python experiments/cast_tax.py
    python experiments/cast_tax.py model=gpt2 data.batch=1 data.length=128

Activations are bf16 in all three. Autocast caches the weights that it cast, but not under inference_mode.

:chapter: Training against inference
"""

import sys
from collections.abc import Callable, Iterator

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.estimates import ratio
from isoforward.base.results import Results, Row
from isoforward.measure.case import Case, Laps, batch_of, master_of, record, row, spent, timed
from isoforward.model import steps
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.loss import next_token_loss
from isoforward.show.compare import only

WAYS = ("cast beforehand", "cast on the fly", "autocast")
PHASES = (("training", "forward", "step"), ("inference", "forward", "step"), ("inference", "decode", "token"))
DECODED = 16


def model_for(case: Case, way: str) -> GPT:
    model = master_of(case)
    if way == "autocast":
        model.dtype = torch.float32
    if way == "cast beforehand":
        model = model.to(torch.bfloat16)
    return model


def candidate(case: Case, way: str) -> Callable[[], dict[str, float]]:
    model = model_for(case, way)
    tokens, targets = batch_of(case)
    casting = torch.autocast(case.device, dtype=torch.bfloat16, enabled=way == "autocast")
    # attention gives autocast's keys and values in bf16, whatever the model's dtype
    cache = KVCache(case.model, batch=1, capacity=case.prompt + 1, dtype=torch.bfloat16, device=case.device)
    cache.fill(0)

    def train() -> None:
        with casting:
            next_token_loss(model.train()(tokens), targets)

    @torch.inference_mode()
    def serve() -> None:
        with casting:
            model.eval()(tokens)

    def decode() -> None:
        with casting:
            for _ in range(DECODED):
                cache.length = case.prompt
                steps.decode(model, tokens[:1, :1], cache)

    return lambda: {
        "training forward": spent(case, train),
        "inference forward": spent(case, serve),
        "inference decode": spent(case, decode) / DECODED,
    }


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        for way in WAYS:
            for life, phase, per in PHASES:
                samples = [lap[f"{life} {phase}"] for lap in laps[way]]
                executions = DECODED if phase == "decode" else 1
                conditions = case.training(weights=way, executions=executions)
                yield row(case, life=life, phase=phase, per=per, **timed(samples), conditions=conditions)

    return record(packed, {way: candidate(case, way) for way in WAYS}, tell)


def answer(results: Results) -> str:
    told = []
    for life, phase, _ in PHASES:
        base, *taxed = (only(results, life=life, phase=phase, weights=way) for way in WAYS)
        flying, autocast = (units.times(ratio(one.samples, base.samples).value) for one in taxed)
        told.append(f"{life} {phase}: on the fly {flying}, autocast {autocast}")
    return f"Against weights cast beforehand: {'; '.join(told)}."


def main(config: ExperimentConfig) -> None:
    if config.precision != "bf16":
        raise BadInput(f"precision={config.precision}: only precision=bf16 has casts to ask about")
    ask(config, "cast_tax", "cast_tax:measure", answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
