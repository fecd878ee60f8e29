"""Which modules a training step calls from outside, and what DDP, torch.compile and Transformers make of a module."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def callable_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The module, and those directly beneath it, which a training step may call instead; each has weights to train.

    None of a module that torch.compile has compiled in place: a hook would break its graph.
    """
    if compiled_in_place(root):
        return
    if any(parameter.requires_grad for parameter in root.parameters()):
        yield root
        if "_orig_mod" not in root._modules and not isinstance(root, nn.Sequential):  # torch.compile made the former
            yield from _beneath(root)


def _beneath(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _beneath(child)
        elif not compiled_in_place(child) and any(parameter.requires_grad for parameter in child.parameters()):
            yield child


def computes_its_loss(module: nn.Module) -> bool:
    """As models of Transformers do, where they are given labels."""
    return isinstance(getattr(type(module), "loss_function", None), property)


def alive() -> Iterator[nn.Module]:
    """Every module of this process."""
    for one in gc.get_objects():
        if issubclass(type(one), nn.Module):  # isinstance would ask proxies, which then load what they stand for
            yield one


def trained_by(optimizers: Iterable[Optimizer]) -> list[nn.Module]:
    """Modules that no other one holds, and that have weights which these optimizers update."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    weights = {id(weight) for group in groups for weight in group["params"]}
    modules = list(alive())
    held = {id(child) for module in modules for child in module.children()}
    return [
        module
        for module in modules
        if id(module) not in held and any(id(weight) in weights for weight in module.parameters())
    ]


def compiled_from(module: nn.Module) -> nn.Module:
    """What torch.compile(module) gave, where it is there: hooks on the module itself would become part of its graph."""
    return next((one for one in alive() if one._modules.get("_orig_mod") is module), module)


def compiled(roots: Iterable[nn.Module]) -> bool:
    every = (module for root in roots for module in root.modules())
    return any("_orig_mod" in module._modules or compiled_in_place(module) for module in every)


def compiled_in_place(module: nn.Module) -> bool:
    """Or with its training_step, as Lightning does with a module that was compiled."""
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """What DDP holds: its own forward may ask other processes for something."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def innermost(module: nn.Module) -> nn.Module:
    """Theirs, without what DDP and torch.compile have put around it."""
    held = module._modules.get("_orig_mod") or unwrapped(module)
    return module if held is module else innermost(held)
