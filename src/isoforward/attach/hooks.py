"""Where phases begin and end in code that is not ours, by hooks on what PyTorch itself runs. `undo` leaves none behind.

    data        a DataLoader makes its iterator or fetches a batch
    transfer    outside everything else, a tensor moves to another device
    forward     a module with weights to train that no other one called
    loss        between the last forward and its backward, or a Transformers model's own loss function
    backward    torch.autograd.backward, which Tensor.backward calls
    clipping    torch.nn.utils.clip_grad_norm_ and clip_grad_value_
    optimizer   Optimizer.step without what its closure does, Optimizer.zero_grad, and a GradScaler's work
    communication  a collective of torch.distributed that Python calls; DDP's own are within backward

Steps that are not timed by phase keep only the hooks that tell where they end: on a batch, before the modules that are
known to be called from outside, on backward and on the optimizer's step. All else is then what it was, but for classes:
one whose attributes change again and again is no longer cached by Python.

Where a loop has no name for its validation, that is what runs while the model is in eval mode and records no gradient,
from the first batch that is fetched in this mode. Checkpointing is then torch.save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.hooks import RemovableHandle

from isoforward.attach.account import BACKWARD, DATA, FORWARD, IGNORED, LOSS, OPTIMIZER, RESIDUAL, Account
from isoforward.attach.frozen import Call
from isoforward.attach.modules import callable_modules, computes_its_loss, unwrapped
from isoforward.attach.ranks import COLLECTIVES, COMMUNICATION
from isoforward.attach.sampling import TIMED

Function = Callable[..., object]


class Swap:
    """An attribute that is replaced for some time."""

    def __init__(self, owner: object, name: str, replacement: Function) -> None:
        self.owner, self.name, self.replacement = owner, name, replacement
        self.own: object = None

    def put(self) -> None:
        self.own = vars(self.owner).get(self.name)
        setattr(self.owner, self.name, self.replacement)

    def take(self) -> None:
        if self.own is None:  # the class has it
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.own)


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
        self.inner: set[nn.Module] = set()  # those that another one called
        self.before: dict[nn.Module, RemovableHandle] = {}
        self.after: dict[nn.Module, RemovableHandle] = {}
        self.swaps: list[Swap] = []  # of steps that are timed by phase
        self.swapped = False
        self.optimizers: list[Optimizer] = []
        self.calls: list[int] = []  # forwards that are open
        self.updates: list[int] = []  # optimizer steps that are open
        self.captured: dict[int, list[Call]] = {}  # forwards of the last timed step, by its calls of backward
        self.capturing: list[Call] = []
        self.undoing = ExitStack()

    def undo(self) -> None:
        self._swap(False)
        self._hook((), ())
        self.undoing.close()

    def __deepcopy__(self, memo: object) -> Hooks:
        """A copy of the model, as for an average of its weights, has no account of its own."""
        return self

    def __reduce__(self) -> tuple[type[Unhooked], tuple[()]]:
        return Unhooked, ()

    # What is replaced, and what is called instead

    def replace(self, owner: object, name: str, replacement: Function) -> None:
        """In every step."""
        swap = Swap(owner, name, replacement)
        swap.put()
        self.undoing.callback(swap.take)

    def replace_while_timed(self, owner: object, name: str, replacement: Function) -> None:
        swap = Swap(owner, name, replacement)
        self.swaps.append(swap)
        if self.swapped:
            swap.put()

    def during(self, phase: str, function: Function, follow: Callable[[], None] | None = None) -> Function:
        """`follow` is called first."""
        account = self.account

        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            if follow is not None:
                follow()
            depth = account.enter(phase)
            if depth == IGNORED:
                return function(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            finally:
                account.leave(depth)

        return timed

    def time(self, owner: object, name: str, phase: str) -> None:
        """In the steps that are timed by phase."""
        self.replace_while_timed(owner, name, self.during(phase, getattr(owner, name)))

    def time_always(self, owner: object, name: str, phase: str, follow: Callable[[], None] | None = None) -> None:
        follows = follow if self.validation_by_mode else None
        self.replace(owner, name, self.during(phase, getattr(owner, name), follows))

    def watch_torch(self) -> None:
        self.time_always(DataLoader, "__iter__", DATA, self._follow_batch)
        self.time_always(_BaseDataLoaderIter, "__next__", DATA, self._follow_batch)
        self.time_always(torch.autograd, "backward", BACKWARD, self._follow_backward)
        # What clip_grad_norm_ calls: the function itself may have been imported by name already.
        for name in ("_get_total_norm", "_clip_grads_with_norm_"):
            self.time(torch.nn.utils.clip_grad, name, "clipping")
        self.time(torch.nn.utils, "clip_grad_value_", "clipping")
        self.time_always(Optimizer, "zero_grad", OPTIMIZER)
        for name in ("unscale_", "step", "update"):
            self.time_always(torch.amp.GradScaler, name, OPTIMIZER)
        if torch.accelerator.is_available():
            self.replace(Tensor, "to", self._moving(Tensor.to))
        if self.validation_by_mode:
            self.time_always(torch, "save", "checkpointing")
        self.undoing.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        self.undoing.callback(register_optimizer_step_post_hook(self._after_step).remove)

    def watch_collectives(self) -> None:
        for name in COLLECTIVES:
            self.time(torch.distributed, name, COMMUNICATION)

    def watch_module(self, root: nn.Module) -> None:
        self.roots.append(root)
        self.modules += callable_modules(root)
        if computes_its_loss(root):
            loss: Any = root.loss_function
            self.replace_while_timed(root, "_loss_function", self.during(LOSS, loss))

    def _swap(self, wanted: bool) -> None:
        if wanted != self.swapped:
            self.swapped = wanted
            for swap in self.swaps if wanted else reversed(self.swaps):
                (swap.put if wanted else swap.take)()

    def _hook(self, before: Collection[nn.Module], after: Collection[nn.Module]) -> None:
        """Before the forward of these modules, after that of these, and at no others."""
        for module in self.before.keys() - before:
            self.before.pop(module).remove()
        for module in self.after.keys() - after:
            self.after.pop(module).remove()
        for module in before:
            if module not in self.before:
                hook = module.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True)
                self.before[module] = hook
        for module in after:
            if module not in self.after:
                self.after[module] = module.register_forward_hook(self.after_forward, always_call=True)

    # Between runs of steps of one kind

    def run_begins(self) -> None:
        self._swap(self.account.by_phase)
        if self.account.by_phase:
            every = [one for one in self.modules if one in self.called or one not in self.inner]
            self._hook(every, every)
        else:
            self._hook(self.called, ())

    def run_ended(self) -> None:
        if self.capturing:
            self.captured[self.account.backwards] = self.capturing
        elif self.swapped:  # no forward in all of it: what is called may have changed
            self.inner.clear()
        self.capturing = []
        self.calls.clear()
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
        if self.validation_by_mode and (self.validation is not None or not torch.is_grad_enabled()):
            self._follow_mode(self._in_eval_mode() and not torch.is_grad_enabled())
        account = self.account
        if FORWARD in account.stack or BACKWARD in account.stack:  # called by another, or recomputed
            self.inner.add(module)
            self.calls.append(IGNORED)
            return
        depth = account.enter(FORWARD)
        if account.by_phase:
            self.called.add(module)
            self.calls.append(depth)
        if account.kind == TIMED and depth != IGNORED:
            self.capturing.append(Call.of(unwrapped(module), args, kwargs))

    def after_forward(self, module: nn.Module, args: object, output: object) -> None:
        if self.calls:  # none of a forward within which steps have ended
            self.account.forward_ended(self.calls.pop())

    def _in_eval_mode(self) -> bool:
        for root in self.roots:  # no any(...): it is asked in every step
            if root.training:
                return False
        return bool(self.roots)

    def _follow_mode(self, evaluates: bool) -> None:
        if evaluates and self.validation is None:
            self.validation = self.account.enter("validation")
        elif self.validation is not None and not evaluates:
            self.account.leave(self.validation)
            self.validation = None

    def _follow_batch(self) -> None:
        if self.validation is not None or (self.trained_in_train_mode and self._in_eval_mode()):
            self._follow_mode(self._in_eval_mode())

    def _follow_backward(self) -> None:
        if self.validation is not None:
            self._follow_mode(False)
        self.trained_in_train_mode = not self._in_eval_mode()

    def _moving(self, function: Function) -> Function:
        timed = self.during("transfer", function)

        @functools.wraps(function)
        def to(tensor: Tensor, *args: object, **kwargs: object) -> object:
            account = self.account  # clipping calls this for each gradient
            if not account.by_phase or account.stack or not moves(tensor, args, kwargs):
                return function(tensor, *args, **kwargs)
            return timed(tensor, *args, **kwargs)

        return to

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.lead = self.lead or optimizer
        if optimizer not in self.optimizers:
            self.optimizers.append(optimizer)
        self.updates.append(self.account.step_begins(leads=optimizer is self.lead))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not self.account.by_phase:
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


def moves(tensor: Tensor, args: Any, kwargs: Any) -> bool:
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    if device is None or device.type == tensor.device.type:
        return device is not None and device.index not in (None, tensor.device.index)
    return True
