"""How much more does the backward of each kind of layer cost than its forward, where 2x is usually assumed?

    python experiments/layers.py
    python experiments/layers.py model=small data.batch=4 precision=bf16

Each kind of layer runs alone on activations of training's shape: frozen forward, training's forward, backward.

:chapter: Training against inference
:unread: measure.context measure.energy measure.new_tokens measure.prompt optim.beta1 optim.beta2 optim.clip optim.lr
optim.min_lr optim.momentum optim.muon_lr optim.schedule optim.warmup_steps optim.weight_decay
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.results import Results, only
from isoforward.measure.benchmark import Part, Work, phased
from isoforward.measure.case import Case, batch_of, master_of
from isoforward.measure.passes import Bench
from isoforward.model import steps
from isoforward.model.gpt import GPT, Block

KINDS = ("embedding", "attention", "mlp", "norm", "head")


def kinds(model: GPT, tokens: Tensor) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]]:
    """Of one layer each: its module, its forward, its input."""
    block = next(each for each in model.modules() if isinstance(each, Block))
    hidden = torch.randn(*tokens.shape, model.config.width, device=tokens.device, dtype=model.dtype)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    rotation = None if model.rotary is None else model.rotary(positions, model.dtype)
    return {
        "embedding": (model.embedding, lambda x: model.embedding(x).to(model.dtype), tokens),
        "attention": (block.attention, lambda x: block.attention(x, rotation, None, 0, None), hidden),
        "mlp": (block.mlp, block.mlp, hidden),
        "norm": (model.norm, model.norm, hidden),
        "head": (model.unembedding, model.unembedding, hidden),
    }


def alone(case: Case, model: GPT, tokens: Tensor, kind: str) -> Work:
    """Frozen forward, training's forward and backward of one kind of layer."""
    module, forward, x = kinds(model, tokens)[kind]
    gradient = torch.randn_like(forward(x))
    if x.is_floating_point():
        x = x.requires_grad_()
    parts = {
        "inference": Part(life="inference", phase="forward", per="step", conditions=case.training(layer=kind)),
        "forward": case.step("forward", layer=kind),
        "backward": case.step("backward", layer=kind),
    }

    def step(phase: steps.Phase) -> None:
        with phase("inference"), torch.inference_mode():
            forward(x)
        with phase("forward"):
            made = forward(x)
        with phase("backward"):
            made.backward(gradient)  # type: ignore[no-untyped-call]
        module.zero_grad(set_to_none=True)
        x.grad = None

    return phased(case.clock, parts, step)


def bench(case: Case) -> Bench:
    tokens, _ = batch_of(case)
    model = master_of(case)
    works = [alone(case, model, tokens, kind) for kind in KINDS]
    return Bench(works=works, pairs=[(work.parts[2], work.parts[1]) for work in works])


def answer(results: Results) -> str:
    told = []
    for kind in KINDS:
        backward = only(results, phase="backward", layer=kind, quantity="time")
        forward = only(results, life="training", phase="forward", layer=kind, quantity="time")
        told.append(f"{kind} {units.times(results.judge(backward, forward).ratio.value)}")
    return f"Backward against forward, in time: {', '.join(told)}."


def main(config: ExperimentConfig) -> None:
    ask(config, "layers", bench, answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
