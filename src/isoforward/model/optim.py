"""Optimizers, the parameters that each of their parts takes, and the learning rate of step k as a function of k.

The matrices of the blocks decay, and are Muon's where there is Muon. Embeddings (the unembedding with them), norms and
biases do not decay: decay is there to keep products of matrices small, and a rare token's row would only fade.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adamw import adamw

from isoforward.base.config import OptimConfig
from isoforward.model.gpt import GPT

EPS = 1e-8  # Adam's
FUSED = ("cpu", "cuda", "mps")  # devices with a kernel for the whole update of a parameter
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024: steepest at zero, at the price of ending only near one


def build(model: GPT, config: OptimConfig) -> Optimizer:
    """Of what is trained. adam and sgd know decay as a part of the gradient, adamw and muon as a shrinking of the
    weights beside it.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in trained.items() if n.startswith("blocks.") and p.dim() == 2}
    others = [p for n, p in trained.items() if n not in matrices]
    fused = model.embedding.weight.device.type in FUSED
    betas = (config.beta1, config.beta2)
    rest = {"params": others, "weight_decay": 0.0, "peak_lr": config.lr, "lr": config.lr}
    if config.name == "muon":
        return Muon(
            [*muon_groups(model, matrices, config), rest | {"betas": betas, "eps": EPS, "fused": fused}],
            dtype=model.dtype,
        )
    decaying = rest | {"params": list(matrices.values()), "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return SGD([decaying, rest], momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
    kind: type[Adam] = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind([decaying, rest], betas=betas, eps=EPS, fused=fused)


def muon_groups(model: GPT, matrices: Mapping[str, Tensor], config: OptimConfig) -> list[dict[str, object]]:
    """A group for the matrices that play one part, over all blocks, with the rows of what they fuse.

    Queries, keys and values are three maps that happen to be computed at once, as are gate and up: made orthogonal
    together, the larger would drown the others.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, matrix in matrices.items():
        parts[name.split(".", 2)[2]].append(matrix)  # blocks.3.mlp.up.weight: mlp.up.weight
    fused = model.config.fused_rows
    return [
        {
            "params": alike,
            "rows": fused.get(part.split(".")[-2], [alike[0].shape[0]]),
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "peak_lr": config.muon_lr,
            "lr": config.muon_lr,
        }
        for part, alike in parts.items()
    ]


class Muon(Optimizer):
    """Muon (Jordan 2024) on groups that have `rows`, AdamW on those that have `betas`.

    Momentum is made orthogonal, so that every direction a matrix can act in is learnt at the same pace. `dtype` is that
    of the matrix products this takes. Unlike torch.optim.Muon it also works in fp32, on matrices that are several fused
    (`rows` each), and on all matrices of a group at once.
    """

    def __init__(self, groups: list[dict[str, object]], *, dtype: torch.dtype) -> None:
        super().__init__(groups, {})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            if parameters:
                (self.orthogonal_step if "rows" in group else self.adamw_step)(group, parameters, gradients)
        return loss

    def orthogonal_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        pace = group["momentum"]
        ahead = []  # Nesterov's
        for p, gradient in zip(parameters, gradients, strict=True):
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(gradient, 1 - pace)
            ahead.append(gradient.lerp(momentum, pace))
        fused = torch.stack(ahead).split_with_sizes(group["rows"], dim=1)
        updates = torch.cat([orthogonal(part, self.dtype) * gain(part) for part in fused], dim=1)
        for p, update in zip(parameters, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def adamw_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                device = p.device if group["fused"] else "cpu"
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        exp_avgs, exp_avg_sqs, steps = (
            [self.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, rows, columns) to about U V^T of each U S V^T: five Newton-Schulz steps leave singular values near one."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)  # (N, short, long)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT  # (N, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def gain(matrices: Tensor) -> float:
    """So that tall matrices, too, change what they put out by about the learning rate."""
    rows, columns = matrices.shape[1:]
    return math.sqrt(max(1, rows / columns))


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """The share of the peak at steps 0 to max_steps - 1: a straight rise, the peak, then down to `min_lr` at the last.

    A function of the step alone, so that a resumed run needs no scheduler's state.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps))
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.min_lr + (1 - config.min_lr) * left


def set_learning_rate(optimizer: Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
