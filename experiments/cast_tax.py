"""What do weight casts cost: under autocast, on the fly from fp32 weights, or done beforehand?

    python experiments/cast_tax.py
    python experiments/cast_tax.py model=gpt2 data.batch=1 data.length=128

Activations are bf16 in all three. Autocast caches the weights that it cast, but not under inference_mode.

:chapter: Training against inference
:unread: measure.context measure.energy measure.new_tokens optim.beta1 optim.beta2 optim.clip optim.lr optim.min_lr
optim.momentum optim.muon_lr optim.schedule optim.warmup_steps optim.weight_decay
"""

import sys

import torch

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, only
from isoforward.measure.benchmark import Part, Work, timed
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.passes import Bench, against_first
from isoforward.model import steps
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.loss import next_token_loss

WAYS = ("cast beforehand", "cast on the fly", "autocast")
PHASES = (("training", "forward", "step"), ("inference", "forward", "step"), ("inference", "decode", "token"))
ROOM = 1  # positions beyond the prompt


def model_for(case: Case, way: str) -> GPT:
    model = master_of(case)
    if way == "autocast":
        model.dtype = torch.float32
    if way == "cast beforehand":
        model = model.to(torch.bfloat16)
    return model


def works_of(case: Case, way: str) -> list[Work]:
    """Training's forward, the frozen forward and a decode step."""
    model = model_for(case, way)
    tokens, targets = batch_of(case)
    casting = torch.autocast(case.device, dtype=torch.bfloat16, enabled=way == "autocast")
    # attention gives autocast's keys and values in bf16, whatever the model's dtype
    cache = KVCache(case.model, batch=1, capacity=case.prompt + ROOM, dtype=torch.bfloat16, device=case.device)
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
            cache.rewind(case.prompt)
            steps.decode(model, tokens[:1, :1], cache)

    def part(life: str, phase: str, per: str) -> Part:
        return Part(life=life, phase=phase, per=per, conditions=case.training(weights=way))

    return [timed(case.clock, part(*about), run) for about, run in zip(PHASES, (train, serve, decode), strict=True)]


def bench(case: Case) -> Bench:
    return against_first([works_of(case, way) for way in WAYS])


def answer(results: Results) -> str:
    told = []
    for life, phase, _ in PHASES:
        base, *taxed = (only(results, life=life, phase=phase, weights=way) for way in WAYS)
        flying, autocast = (results.judge(one, base).sentence() for one in taxed)
        told.append(f"{life} {phase}: on the fly {flying}, autocast {autocast}")
    return f"Against weights cast beforehand: {'; '.join(told)}."


def main(config: ExperimentConfig) -> None:
    if config.precision != "bf16":
        raise BadInput(f"precision={config.precision}: only precision=bf16 has casts to ask about")
    ask(config, "cast_tax", bench, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
