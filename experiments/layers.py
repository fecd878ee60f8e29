"""How much more does the backward of each kind of layer cost than its forward, where 2x is usually assumed?

    python experiments/layers.py
    python experiments/layers.py model=small data.batch=4 precision=bf16

Each kind of layer runs alone on activations of training's shape: frozen forward, training's forward, backward.

:chapter: Training against inference
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.estimates import ratio
from isoforward.base.results import Results, Row
from isoforward.measure.case import Case, Laps, batch_of, master_of, record, row, spent, timed
from isoforward.model.gpt import GPT
from isoforward.show.compare import only

KINDS = ("embedding", "attention", "mlp", "norm", "head")


def kinds(model: GPT, tokens: Tensor) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]]:
    """Of one layer each: its module, its forward, its input."""
    block = model.blocks[0]
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


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    tokens, _ = batch_of(case)
    model = master_of(case)

    def candidate(kind: str) -> Callable[[], dict[str, float]]:
        module, forward, x = kinds(model, tokens)[kind]
        gradient = torch.randn_like(forward(x))
        if x.is_floating_point():
            x = x.requires_grad_()

        def sample() -> dict[str, float]:
            frozen_s = spent(case, torch.inference_mode()(lambda: forward(x)))
            made: list[Tensor] = []
            forward_s = spent(case, lambda: made.append(forward(x)))
            backward_s = spent(case, lambda: made[0].backward(gradient))
            module.zero_grad(set_to_none=True)
            x.grad = None
            return {"inference": frozen_s, "forward": forward_s, "backward": backward_s}

        return sample

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        for kind in KINDS:
            for name, life, phase in (
                ("inference", "inference", "forward"),
                ("forward", "training", "forward"),
                ("backward", "training", "backward"),
            ):
                samples = [lap[name] for lap in laps[kind]]
                yield row(
                    case, life=life, phase=phase, per="step", **timed(samples), conditions=case.training(layer=kind)
                )

    return record(packed, {kind: candidate(kind) for kind in KINDS}, tell)


def answer(results: Results) -> str:
    told = []
    for kind in KINDS:
        backward = only(results, phase="backward", layer=kind)
        forward = only(results, life="training", phase="forward", layer=kind)
        told.append(f"{kind} {units.times(ratio(backward.samples, forward.samples).value)}")
    return f"Backward against forward, in time: {', '.join(told)}."


def main(config: ExperimentConfig) -> None:
    ask(config, "layers", "layers:measure", answer)


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
