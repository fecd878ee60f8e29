"""Where the memory goes: every byte alive at the moment of the peak, by what it is kept for.

A dispatch mode sees each tensor's storage come and a finaliser sees it go. What a storage was for is often known only
later (a product of the backward becomes a gradient), so the blocks alive at a peak are remembered and named at the end.

    parameters, buffers, gradients, optimizer state, batch
    activations.KIND   made in the forward by that kind of layer and still there when the backward begins
    recomputed         made by a forward that the backward runs again
    cast weights       copies of parameters in the activations' dtype
    logits and loss    made by the head and the loss, and their gradients
    temporaries        gone within its phase, the gradients of activations among them
    retained           outlives the step, and is none of the above: a leak

Inference has weights, buffers, KV cache, batch, transients, retained.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoforward.base import device as devices
from isoforward.base.device import device_of
from isoforward.base.memory_readers import Memory, Unmeasured
from isoforward.measure.flops import Overload, Scope, decomposed, layers_of
from isoforward.model import steps
from isoforward.model.gpt import GPT, KVCache

Step = Callable[..., object]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """`phases`: the bytes by category at the moment of each phase's peak. `retained`: by the phase that made them."""

    phases: dict[str, dict[str, int]]
    retained: dict[str, int]

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: sum(categories.values()) for phase, categories in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def peak_bytes(self) -> int:
        return self.peaks[self.peak_phase]

    @property
    def categories(self) -> dict[str, int]:
        return self.phases[self.peak_phase]


@dataclass(eq=False, kw_only=True)
class Block:
    """One storage. `name` is its category once that is certain."""

    size: int
    phase: str
    kind: str
    alive: weakref.ref[torch.UntypedStorage]
    inference: bool
    recomputed: bool
    survived: bool = False
    name: str | None = None

    def category(self) -> str:
        if self.name is not None:
            return self.name
        if self.inference:
            return "transients"
        if self.kind == "loss" or (self.kind == "head" and self.phase == "forward"):
            return "logits and loss"
        if self.survived and self.phase == "forward":
            return f"activations.{self.kind}"
        return "recomputed" if self.recomputed else "temporaries"


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage on `device` while it is entered; pass it to steps as `phase`.

    With `memory` it also measures, operator by operator, what a kernel takes for itself beside its results.
    """

    def __init__(self, model: nn.Module, device: torch.device, memory: Memory | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scope = Scope(layers_of(model))
        self.device = device
        handed_out = device.type in devices.KINDS  # nothing is on meta
        self.unit = device_of(device).allocation_bytes if handed_out else 1
        self.memory = memory or Unmeasured()
        self.live: dict[int, Block] = {}
        self.total = 0
        self.peaks: dict[str, tuple[int, int, list[Block]]] = {}  # in all, a kernel's own, the blocks
        self.after: Callable[[str], None] = lambda phase: None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase == "backward":
            for block in self.live.values():
                block.survived = True
        with self.scope(phase):
            self.note_peak()
            yield
        self.after(phase)

    def note_peak(self, workspace: int = 0) -> None:
        total = self.total + workspace
        if total > self.peaks.get(self.scope.phase, (-1, 0, []))[0]:
            self.peaks[self.scope.phase] = total, workspace, list(self.live.values())

    def hold(self, tensor: Tensor, kind: str = "embedding") -> Block | None:
        """The block under a tensor, known or new; None where the tensor lies on another device."""
        if tensor.device != self.device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            size = self.unit * -(-storage.nbytes() // self.unit)
            self.live[key] = Block(
                size=size,
                phase=self.scope.phase,
                kind=kind,
                alive=weakref.ref(storage, lambda _: self.release(key)),
                inference=torch.is_inference_mode_enabled(),
                recomputed=self.scope.phase == "backward" and bool(self.scope.within),
            )
            self.total += size
        return self.live[key]

    def release(self, key: int) -> None:
        self.total -= self.live.pop(key).size

    def name(self, name: str, tensors: Iterable[object]) -> None:
        for tensor in tensors:
            block = self.hold(tensor) if isinstance(tensor, Tensor) else None
            if block is not None:
                block.name = name

    def __torch_dispatch__(
        self, operator: Overload, types: object, args: Any = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if operator is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.scope.phase != "optimizer"  # masks are the usual ones, and no gradient is infinite
        kind = self.scope.kind()
        result = decomposed(self, operator, args, kwargs or {})
        if result is not NotImplemented:
            return result
        before = self.total
        self.memory.reset()
        held = self.memory.now()
        result = operator(*args, **(kwargs or {}))
        taken = self.memory.peak() - held
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf, kind)
        if operator is torch.ops.aten._to_copy.default and self.named(args[0]) in ("parameters", "weights"):
            self.name("cast weights", (result,))
        self.note_peak(max(0, taken - (self.total - before)))
        return result

    def named(self, tensor: Tensor) -> str | None:
        known = self.live.get(tensor.untyped_storage()._cdata)
        return known.name if known else None

    def close(self) -> Ledger:
        if any(block.name is None for block in self.live.values()):
            gc.collect()  # what only a cycle holds is no leak
        retained: Counter[str] = Counter()
        for block in self.live.values():
            if block.name is None:
                block.name = "retained"
                retained[block.phase] += block.size
        phases = {}
        for phase, (_, workspace, blocks) in self.peaks.items():
            categories = Counter({"kernel workspace": workspace} if workspace else {})
            for block in blocks:
                categories[block.category()] += block.size
            phases[phase] = dict(categories)
        phases.pop("outside", None)
        return Ledger(phases=phases, retained=dict(retained))


def optimizer_state(optimizer: Optimizer) -> Iterator[object]:
    for state in optimizer.state.values():
        yield from state.values()


def training_ledger(
    model: nn.Module,
    optimizer: Optimizer,
    tokens: Tensor,
    targets: Tensor,
    *,
    step: Step = steps.train_step,
    memory: Memory | None = None,
) -> Ledger:
    """Of one real optimizer step, which changes the weights. Adam's state appears at the end of its first step."""
    watch = Watch(model, tokens.device, memory)
    watch_training(watch, model, optimizer, tokens, targets, step=step)
    return watch.close()


def watch_training(
    watch: Watch, model: nn.Module, optimizer: Optimizer, tokens: Tensor, targets: Tensor, *, step: Step
) -> None:
    def after(phase: str) -> None:
        if phase == "backward":
            watch.name("gradients", (parameter.grad for parameter in model.parameters()))
        if phase == "optimizer":
            watch.name("optimizer state", optimizer_state(optimizer))

    watch.name("parameters", model.parameters())
    watch.name("buffers", model.buffers())
    watch.name("batch", (tokens, targets))
    watch.after = after
    after("backward")
    after("optimizer")
    with watch.scope.following(), watch:
        step(model, optimizer, tokens, targets, phase=watch)


def inference_ledger(
    model: GPT, tokens: Tensor, cache: KVCache | None = None, *, new_tokens: int = 2, memory: Memory | None = None
) -> Ledger:
    """Of `new_tokens` likeliest tokens after the prompts (B, T): one by prefill, the others by decode.

    With no cache each of them is had by the whole forward. With no new tokens the prompts go through training's
    forward, which has the logits of every position.
    """
    watch = Watch(model, tokens.device, memory)
    watch.name("weights", model.parameters())
    watch.name("buffers", model.buffers())
    watch.name("batch", (tokens,))
    if cache is not None:
        watch.name("KV cache", (*cache.keys, *cache.values))
    with watch.scope.following(), watch:
        generate(model, tokens, cache, new_tokens=new_tokens, phase=watch)
    return watch.close()


@torch.inference_mode()
def generate(
    model: steps.Decoder[steps.Cache], tokens: Tensor, cache: steps.Cache | None, *, new_tokens: int, phase: steps.Phase
) -> None:
    if not new_tokens:
        with phase("forward"):
            model(tokens)
        return
    if cache is None:
        for _ in range(new_tokens):
            logits = steps.decode_uncached(model, tokens, phase=phase)
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
        return
    logits = steps.prefill(model, tokens, cache, phase=phase)
    for _ in range(new_tokens - 1):
        logits = steps.decode(model, logits.argmax(-1, keepdim=True), cache, phase=phase)
