"""How far a module's outputs in training mode are from those in inference, and which of its layers are the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from isoforward.attach.frozen import Call, frozen

UNLIKE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
ALL, OTHERS = "every layer", "what is no layer of PyTorch"


def unlike_in_training(modules: Sequence[nn.Module]) -> list[str]:
    """Kinds of layers whose output in eval mode is another one than in training."""
    every = (part for module in modules for part in module.modules())
    return sorted({type(part).__name__ for part in every if is_unlike(part)})


def is_unlike(part: nn.Module) -> bool:
    return isinstance(part, UNLIKE) and bool(getattr(part, "p", True))


def distances(calls: Sequence[Call]) -> dict[str, float]:
    """Largest difference from inference's outputs, over the largest of these, with only some layers as in training.

    0 is bit for bit the same. By kind of layer; `OTHERS` is a forward of their own that asks in which mode it is. Of
    several modules, each called once, it is that of the farthest.
    """
    kinds = unlike_in_training([call.module for call in calls])
    chosen: dict[str, Callable[[nn.Module], bool]] = {ALL: lambda part: True}
    for kind in kinds:
        chosen[kind] = lambda part, kind=kind: is_unlike(part) and type(part).__name__ == kind  # type: ignore[misc]
    chosen[OTHERS] = lambda part: not is_unlike(part)
    firsts = {call.module: call for call in reversed(calls)}.values()
    return {name: max(distance(call, trains) for call in firsts) for name, trains in chosen.items()}


def distance(call: Call, trains: Callable[[nn.Module], bool]) -> float:
    with frozen([call]):
        served = outputs(call)
        for part in call.module.modules():
            part.training = trains(part)
        trained = outputs(call)
    pairs = [(one.double(), other.double()) for one, other in zip(served, trained, strict=True)]
    if all(torch.equal(one, other) for one, other in pairs):
        return 0.0
    largest = max(float(one.abs().max()) for one, _ in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / (largest or 1.0)


def outputs(call: Call) -> list[Tensor]:
    output = call.run()
    leaves = tree_leaves(getattr(output, "logits", output))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
