"""Where phases begin and end in code that is not ours, by hooks on what PyTorch itself runs. `undo` leaves none behind.

Steps that are not timed by phase keep only those that tell where they end: on a batch, on the modules that are known to
be called from outside, on backward and on the optimizer's step. What else was replaced then passes its call on.

    data        a DataLoader makes its iterator or fetches a batch
    transfer    outside everything else, a tensor moves to another device
    forward     a module with weights to train that no other one called
    loss        between the last forward and its backward, or a Transformers model's own loss function
    backward    torch.autograd.backward, which Tensor.backward calls
    clipping    torch.nn.utils.clip_grad_norm_ and clip_grad_value_
    optimizer   Optimizer.step without what its closure does, Optimizer.zero_grad, and a GradScaler's work
    communication  a collective of torch.distributed that Python calls; DDP's own are within backward

Where a loop has no name for its validation, that is what runs while the model is in eval mode and records no gradient,
from the first batch that is fetched in this mode. Checkpointing is then torch.save.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.hooks import RemovableHandle

from isoforward.attach.account import (
    BACKWARD,
    DATA,
    FORWARD,
    IGNORED,
    LOSS,
    OCCASIONS,
    OPTIMIZER,
    RESIDUAL,
    Account,
)
from isoforward.attach.frozen import Call
from isoforward.attach.ranks import COLLECTIVES, COMMUNICATION, unwrapped
from isoforward.attach.sampling import TIMED

Function = Callable[..., object]

ALWAYS = (DATA, FORWARD, BACKWARD, *OCCASIONS)  # also in steps that are not timed by phase


class Hooks:
    def __init__(self, account: Account, *, lead: Optimizer | None = None, validation_by_mode: bool = False) -> None:
        self.account = account
        self.lead = lead  # None: the first to step
        self.validation_by_mode = validation_by_mode
        self.validation: int | None = None
        self.trained_in_train_mode = False
        self.roots: list[nn.Module] = []
        self.modules: list[nn.Module] = []  # that a training step may call
        self.called: set[nn.Module] = set()  # those of them that were, and by no other one
        self.hooked: dict[nn.Module, list[RemovableHandle]] = {}
        self.optimizers: list[Optimizer] = []
        self.calls: list[int] = []  # forwards that are open
        self.updates: list[int] = []  # optimizer steps that are open
        self.captured: dict[int, list[Call]] = {}  # forwards of the last timed step, by its calls of backward
        self.capturing: list[Call] = []
        self.undoing = ExitStack()

    def undo(self) -> None:
        self.undoing.close()

    def __deepcopy__(self, memo: object) -> Hooks:
        """A copy of the model, as for an average of its weights, has no account of its own."""
        return self

    def __reduce__(self) -> tuple[type[Unhooked], tuple[()]]:
        return Unhooked, ()

    # What is replaced, and what is called instead

    def replace(self, owner: object, name: str, replacement: Function) -> None:
        own = vars(owner).get(name)
        setattr(owner, name, replacement)
        if own is None:
            self.undoing.callback(delattr, owner, name)
        else:
            self.undoing.callback(setattr, owner, name, own)

    def during(self, phase: str, function: Function) -> Function:
        always = phase in ALWAYS

        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            if not (always or self.account.by_phase):
                return function(*args, **kwargs)
            depth = self.account.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.account.leave(depth)

        return timed

    def time(self, owner: object, name: str, phase: str) -> None:
        self.replace(owner, name, self.during(phase, getattr(owner, name)))

    def watch_torch(self) -> None:
        for owner, name in ((DataLoader, "__iter__"), (_BaseDataLoaderIter, "__next__")):
            self.replace(owner, name, self._fetching(getattr(owner, name)))
        self.replace(torch.autograd, "backward", self._backward(torch.autograd.backward))
        # What clip_grad_norm_ calls: the function itself may have been imported by name already.
        for name in ("_get_total_norm", "_clip_grads_with_norm_"):
            self.time(torch.nn.utils.clip_grad, name, "clipping")
        self.time(torch.nn.utils, "clip_grad_value_", "clipping")
        self.time(Optimizer, "zero_grad", OPTIMIZER)
        for name in ("unscale_", "step", "update"):
            self.time(torch.amp.GradScaler, name, OPTIMIZER)
        for name in COLLECTIVES if torch.distributed.is_available() else ():
            self.time(torch.distributed, name, COMMUNICATION)
        if torch.accelerator.is_available():  # clipping calls it for each gradient
            self.replace(Tensor, "to", self._moving(Tensor.to))
        if self.validation_by_mode:
            self.time(torch, "save", "checkpointing")
        self.undoing.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        self.undoing.callback(register_optimizer_step_post_hook(self._after_step).remove)

    def watch_module(self, root: nn.Module) -> None:
        self.roots.append(root)
        self.modules += callable_modules(root)
        self.undoing.callback(self._hook, ())
        if computes_its_loss(root):
            loss: Any = root.loss_function
            self.replace(root, "_loss_function", self.during(LOSS, loss))

    def _hook(self, modules: Collection[nn.Module]) -> None:
        """These and no others."""
        for module in self.hooked.keys() - modules:
            for handle in self.hooked.pop(module):
                handle.remove()
        for module in modules:
            if module not in self.hooked:
                before = module.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True)
                after = module.register_forward_hook(self.after_forward, always_call=True)
                self.hooked[module] = [before, after]

    # Between steps

    def step_begins(self) -> None:
        """What is replaced stays so: a class whose attributes change again and again is no longer cached by Python."""
        every = self.account.by_phase or not self.called
        self._hook(self.modules if every else self.called)

    def step_ended(self) -> None:
        if self.capturing:
            self.captured[self.account.backwards] = self.capturing
        self.capturing = []
        self.updates.clear()
        self.validation = None

    def within_forward(self, function: Function) -> Function:
        """Lightning calls a model that is wrapped, as by DDP, to get to its training_step, which is no forward."""

        @functools.wraps(function)
        def step(*args: object, **kwargs: object) -> object:
            if self.calls and self.calls[-1] != IGNORED:
                self.account.leave(self.calls[-1])
                self.calls[-1] = IGNORED
                self.capturing = self.capturing[:-1]
            return function(*args, **kwargs)

        return step

    # What the hooks do

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.validation_by_mode:
            self._follow_mode(self._in_eval_mode and not torch.is_grad_enabled())
        stack = self.account.stack
        if FORWARD in stack or BACKWARD in stack:  # called by another, or recomputed
            self.calls.append(IGNORED)
            return
        self.called.add(module)
        depth = self.account.enter(FORWARD)
        self.calls.append(depth)
        if self.account.kind == TIMED and depth >= 0:
            self.capturing.append(Call.of(unwrapped(module), args, kwargs))

    def after_forward(self, module: nn.Module, args: object, output: object) -> None:
        self.account.forward_ended(self.calls.pop())

    @property
    def _in_eval_mode(self) -> bool:
        return bool(self.roots) and not any(root.training for root in self.roots)

    def _follow_mode(self, evaluates: bool) -> None:
        if evaluates and self.validation is None:
            self.validation = self.account.enter("validation")
        elif self.validation is not None and not evaluates:
            self.account.leave(self.validation)
            self.validation = None

    def _fetching(self, function: Function) -> Function:
        timed = self.during(DATA, function)

        @functools.wraps(function)
        def fetch(*args: object, **kwargs: object) -> object:
            if self.validation_by_mode:
                validates = self.validation is not None or self.trained_in_train_mode
                self._follow_mode(validates and self._in_eval_mode)
            return timed(*args, **kwargs)

        return fetch

    def _backward(self, function: Function) -> Function:
        timed = self.during(BACKWARD, function)

        @functools.wraps(function)
        def backward(*args: object, **kwargs: object) -> object:
            if self.validation_by_mode:
                self._follow_mode(False)
                self.trained_in_train_mode = not self._in_eval_mode
            return timed(*args, **kwargs)

        return backward

    def _moving(self, function: Function) -> Function:
        timed = self.during("transfer", function)

        @functools.wraps(function)
        def to(tensor: Tensor, *args: object, **kwargs: object) -> object:
            account = self.account
            if not account.by_phase or account.stack or not moves(tensor, args, kwargs):
                return function(tensor, *args, **kwargs)
            return timed(tensor, *args, **kwargs)

        return to

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.lead = self.lead or optimizer
        if not any(optimizer is known for known in self.optimizers):
            self.optimizers.append(optimizer)
        self.updates.append(self.account.step_begins(leads=optimizer is self.lead))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None
        timed = self.during(RESIDUAL, closure)  # what it calls has phases of its own
        return (args, kwargs | {"closure": timed}) if "closure" in kwargs else ((args[0], timed, *args[2:]), kwargs)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self.updates:
            self.account.step_ended(self.updates.pop(), leads=optimizer is self.lead)


class Unhooked:
    """In place of the hooks in a pickled model."""

    def before_forward(self, module: nn.Module, args: object, kwargs: object) -> None: ...

    def after_forward(self, module: nn.Module, args: object, output: object) -> None: ...


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


def trained_by(optimizers: Iterable[Optimizer]) -> list[nn.Module]:
    """Modules that no other one holds, and that have weights which these optimizers update."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    weights = {id(weight) for group in groups for weight in group["params"]}
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    held = {id(child) for module in modules for child in module.children()}
    return [
        module
        for module in modules
        if id(module) not in held and any(id(weight) in weights for weight in module.parameters())
    ]


def compiled_from(module: nn.Module) -> nn.Module:
    """What torch.compile(module) gave, where it is there: hooks on the module itself would become part of its graph."""
    modules = (one for one in gc.get_objects() if issubclass(type(one), nn.Module))
    return next((one for one in modules if one._modules.get("_orig_mod") is module), module)


def moves(tensor: Tensor, args: Any, kwargs: Any) -> bool:
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    if device is None or device.type == tensor.device.type:
        return device is not None and device.index not in (None, tensor.device.index)
    return True


def compiled(roots: Iterable[nn.Module]) -> bool:
    every = (module for root in roots for module in root.modules())
    return any("_orig_mod" in module._modules or compiled_in_place(module) for module in every)


def compiled_in_place(module: nn.Module) -> bool:
    """Or with its training_step, as Lightning does with a module that was compiled."""
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None
