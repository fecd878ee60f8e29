"""What each phase asks the device to do: every operator that the real forward, backward and optimizer dispatch.

They are recorded on fake tensors, which have a shape, a dtype and a device but no data: a 70B model is recorded on a
laptop, and by the very kernels' names that its device would run. Blocks are alike, so that one and two of them tell
any number.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.model import steps
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.optim import build

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
VECTOR_PRODUCTS = {aten.mv.default: 0, aten.addmv.default: 1}
ONEDNN_PRODUCT = "mkldnn::_linear_pointwise"
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 1,
}
LOOKUPS = (aten.embedding.default, aten.index.Tensor)


class Operator(NamedTuple):
    """`work` is a product's or an attention's FLOPs, and the bytes that anything else reads and writes."""

    kind: str  # what it does, in which layout and dtype
    size: tuple[int, ...]  # over which its cost is interpolated
    work: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """One phase, of any number of layers: `counts` may be fractions of what no whole number of layers has."""

    counts: Mapping[Operator, float]
    dispatched: float  # operators in all, those among them that only look at memory in another way

    @property
    def operators(self) -> float:
        return sum(self.counts.values())


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operator that can be run again."""

    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, object] = field(default_factory=dict)

    def real(self) -> Call:
        """On tensors that hold numbers which no kernel finds special: neither zero, negative, nor tiny."""
        arguments, options = tree_map(_real, (self.arguments, dict(self.options)))
        return Call(function=self.function, arguments=arguments, options=options)

    def __call__(self) -> object:
        return self.function(*self.arguments, **self.options)


def _real(leaf: object) -> object:
    if not isinstance(leaf, Tensor):
        return leaf
    extent = 1 + sum((n - 1) * step for n, step in zip(leaf.shape, leaf.stride(), strict=True)) if leaf.numel() else 0
    flat = torch.ones(extent, dtype=leaf.dtype)
    if leaf.dim() and leaf.is_floating_point():
        flat.uniform_(0.01, 1)
    elif leaf.dim() and leaf.dtype == torch.int64:
        flat.random_(0, 16)
    return flat.as_strided(leaf.shape, leaf.stride())


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Pass it to steps as `phase`, within a FakeTensorMode; or, `timing`, on tensors that hold data.

    The first keeps an example of each operator; the second what each took where it ran, and no tensor that its kernel
    would have taken again while it was in the caches.
    """

    def __init__(self, *, timing: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timing = timing
        self.phase = "outside"
        self.counts: dict[str, dict[Operator, int]] = defaultdict(lambda: defaultdict(int))
        self.dispatched: dict[str, int] = defaultdict(int)
        self.examples: dict[Operator, Call] = {}
        self.took_s: dict[str, dict[Operator, list[float]]] = defaultdict(lambda: defaultdict(list))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        yield
        self.phase = outer

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function.namespace != "aten" and function.name() != ONEDNN_PRODUCT:
            return function(*args, **options)
        if function is aten._local_scalar_dense.default:
            return 0  # the one question that a step asks its data: is the gradient not finite?
        if not torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CPU"):  # silu_backward has both
            with self:
                result = function.decompose(*args, **options)
            if result is not NotImplemented:
                return result
        start = time.perf_counter()
        result = function(*args, **options)
        took_s = time.perf_counter() - start
        self.dispatched[self.phase] += 1
        if not (looks(function) or needless(function, args)):
            for call in one_by_one(Call(function=function, arguments=args, options=options)):
                operator = described(call, result)
                self.counts[self.phase][operator] += 1
                if self.timing:
                    self.took_s[self.phase][operator].append(took_s)  # of a list: the whole list's
                else:
                    self.examples.setdefault(operator, call)
        return result

    def works(self) -> dict[str, Work]:
        return {
            phase: Work(counts=dict(counts), dispatched=self.dispatched[phase])
            for phase, counts in self.counts.items()
            if phase != "outside"
        }


def looks(function: Any) -> bool:
    """Whether its result is its input, seen in another way."""
    returned = function._schema.returns
    return function is aten._unsafe_view.default or bool(
        returned and returned[0].alias_info and not returned[0].alias_info.is_write
    )


def needless(function: Any, arguments: tuple[Any, ...]) -> bool:
    """A copy of what is contiguous already: made of fake tensors only, in inference mode."""
    return function is aten.clone.default and arguments[0].is_contiguous()


def one_by_one(call: Call) -> Iterator[Call]:
    """What is done to a list of parameters, parameter by parameter, so that its cost is linear in layers."""
    if not call.function.__name__.startswith(("_fused", "_foreach")):
        yield call
        return
    for n in range(len(call.arguments[0])):
        taken = tuple([one[n]] if isinstance(one, list) and one else one for one in call.arguments)
        options = {key: [one[n]] if isinstance(one, list) and one else one for key, one in call.options.items()}
        yield replace(call, arguments=taken, options=options)


def described(call: Call, result: object) -> Operator:
    name = call.function.__name__.removesuffix(".default")
    tensors = [leaf for leaf in tree_leaves((call.arguments, call.options)) if isinstance(leaf, Tensor)]
    dtype = str(tensors[0].dtype if tensors else torch.float32).removeprefix("torch.")
    if call.function in PRODUCTS:
        a, b = call.arguments[PRODUCTS[call.function] :][:2]
        batch, m, k, n = prod(a.shape[:-2]), a.shape[-2], a.shape[-1], b.shape[-1]
        layout = "".join("nt"[matrix.stride(-1) != 1 and matrix.shape[-1] > 1] for matrix in (a, b))
        return Operator(f"product {layout} {dtype}", (m, k, n), 2 * batch * m * k * n)
    if call.function.name() == ONEDNN_PRODUCT:
        x, weight = call.arguments[:2]
        (n, k), m = weight.shape, x.numel() // x.shape[-1]
        return Operator(f"product nt {dtype}", (m, k, n), 2 * m * k * n)
    if call.function in VECTOR_PRODUCTS:
        n, k = call.arguments[VECTOR_PRODUCTS[call.function]].shape
        return Operator(f"product nt {dtype}", (1, k, n), 2 * k * n)  # one row, by a weight
    if call.function in ATTENTION:
        backward = ATTENTION[call.function]
        q, k = call.arguments[backward:][:2]
        B, H, T, D = q.shape
        causal = any(argument is True for argument in call.arguments)
        kind = f"attention{' backward' * backward}{' causal' * causal} {dtype}"
        return Operator(kind, (B * H, T, k.shape[2], D), (4, 10)[backward] * B * H * T * k.shape[2] * D)
    if call.function in LOOKUPS:
        tensors = []  # of the table only what is looked up, which is what is made
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    listed = call.function.__name__.startswith(("_fused", "_foreach"))
    moved = sum(map(touched, tensors if listed else [*(tensors or made), *made]))
    return Operator(f"{name} {dtype}", (max(moved, 1),), max(moved, 1))


def touched(tensor: Tensor) -> int:
    """Bytes; of a tensor that is one row repeated, the row's."""
    return tensor.element_size() * prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


def record_training(
    model: ModelConfig, *, batch: int, length: int, dtype: torch.dtype, optim: OptimConfig, checkpointing: str = "none"
) -> Recorder:
    """One optimizer step, from the second on."""
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True):
        gpt = GPT(model, dtype=dtype, checkpointing=checkpointing)
        optimizer = build(gpt, optim)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        for parameter in gpt.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # Adam's state appears
        optimizer.zero_grad(set_to_none=True)
        with recorder:
            steps.train_step(gpt, optimizer, tokens, tokens, clip=optim.clip, phase=recorder)
    return recorder


def record_serving(model: ModelConfig, *, batch: int, length: int, cached: int, dtype: torch.dtype) -> Recorder:
    """Prefill of `length` tokens, a decode step after `cached` ones, and the frozen forward with all its logits."""
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True):
        gpt = GPT(model, dtype=dtype).eval()
        for module in gpt.modules():  # cast beforehand, as freezing does, which cannot be faked
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        tokens = torch.zeros(batch, length, dtype=torch.long)
        cache = KVCache(model, batch=batch, capacity=max(length, cached + 1), dtype=gpt.dtype)
        with recorder:
            steps.prefill(gpt, tokens, cache, phase=recorder)
            cache.rewind(cached)
            with recorder("decode"):
                steps.decode(gpt, tokens[:, :1], cache).argmax(-1, keepdim=True)
    return recorder


def deepened(one: Mapping[str, Work], two: Mapping[str, Work], layers: int) -> dict[str, Work]:
    """Of `layers` blocks, from what one and two of them do."""
    more = layers - 1
    return {
        phase: Work(
            counts={
                operator: count
                for operator in {**one[phase].counts, **two[phase].counts}
                if (count := line(one[phase].counts.get(operator, 0), two[phase].counts.get(operator, 0), more))
            },
            dispatched=line(one[phase].dispatched, two[phase].dispatched, more),
        )
        for phase in one
    }


def line(one: float, two: float, more: int) -> float:
    return one + more * (two - one)
