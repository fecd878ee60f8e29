"""FLOPs, counted by watching what the real forward, backward and optimizer dispatch.

On the meta device tensors have a shape and no data, so that a 70B model is counted on a laptop in seconds. Only matrix
products count, a multiplication and an addition each.

    model      the whole attention square, backward 2 x forward, nothing for recomputation (PaLM, appendix B)
    causal     as model, but only the T(T+1)/2 pairs that a causal mask leaves
    hardware   the whole square, what is recomputed, and attention's backward of 2.5 x its forward, since a fused kernel
               forms the scores again (FlashAttention-2, section 3.1)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from isoforward.base.checks import one_of
from isoforward.base.config import AdapterConfig, ModelConfig, OptimConfig
from isoforward.base.vocabulary import CONVENTIONS
from isoforward.model import steps
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT, Block, KVCache
from isoforward.model.optim import build

aten = torch.ops.aten
Overload = OpOverload[..., object]

OF_PHASE = {"loss": "loss", "optimizer": "optimizer"}


def layers_of(model: nn.Module) -> dict[nn.Module, str]:
    """Modules by kind of layer; what lies within one is of its kind, and what lies outside all of them is embedding."""
    if not isinstance(model, GPT):
        return {}
    layers: dict[nn.Module, str] = {model.norm: "norm", model.unembedding: "head"}
    for block in model.blocks:
        assert isinstance(block, Block)
        layers |= {
            block: "residual",
            block.attention_norm: "norm",
            block.attention: "attention",
            block.mlp_norm: "norm",
            block.mlp: "mlp",
        }
    return layers


class Scope:
    """Knows the phase and the kind of layer of the operator being dispatched; pass it to steps as `phase`.

    An operator of the backward is of the kind of the forward operator whose autograd node dispatched it.
    """

    def __init__(self, layers: Mapping[nn.Module, str]) -> None:
        self.layers = layers
        self.phase = "outside"
        self.within: list[str] = []
        self.node_kinds: dict[int, str] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        yield
        self.phase = outer

    @contextmanager
    def following(self) -> Iterator[None]:
        def enter(kind: str, *_: object) -> None:
            self.within.append(kind)

        def leave(*_: object) -> None:
            self.within.pop()

        hooks = []
        for layer, kind in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(partial(enter, kind)))
            # recomputation leaves a block by an exception, as soon as it has what it came for
            hooks.append(layer.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def kind(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            kind = self.within[-1] if self.within else OF_PHASE.get(self.phase, "embedding")
            self.node_kinds.setdefault(torch._C._autograd._get_sequence_nr() - 1, kind)  # this operator's node
            return kind
        # in the backward, where a layer is within only to be recomputed
        return self.within[-1] if self.within else self.node_kinds.get(node._sequence_nr(), "embedding")


def product(a: Tensor, b: Tensor) -> int:
    """(..., m, k) by (..., k, n); of grouped products, each row or column goes through one group"""
    return 2 * prod(a.shape) * b.shape[-1]


def attention(q: Tensor, k: Tensor, v: Tensor, *, triangle: bool) -> int:
    """q (B, H, T, D) on k (B, K, S, D) and v (B, K, S, E): scores, and what they weigh. A triangle has S = T."""
    B, H, T, D = q.shape
    pairs = T * (T + 1) // 2 if triangle else T * k.shape[-2]
    return 2 * B * H * (D + v.shape[-1]) * pairs


def decomposed(
    mode: TorchDispatchMode, operator: Overload, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> object:
    """An operator that is made of others shows them to the mode, which in inference mode would see it alone.

    NotImplemented for any other operator.
    """
    with mode:
        return operator.decompose(*args, **kwargs)


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`flops` by phase and kind of layer, for as long as it is entered."""

    def __init__(self, scope: Scope, *, convention: str = "model") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        one_of("convention", convention, CONVENTIONS)
        self.scope = scope
        self.convention = convention
        self.flops: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, operator: Overload, types: object, args: Any = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        self.flops[self.scope.phase, self.scope.kind()] += self.count(operator, args)
        if operator is aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # the one question that a step asks its data: is the gradient not finite?
        result = decomposed(self, operator, args, kwargs or {})
        return on_meta(operator, args, kwargs or {}) if result is NotImplemented else result

    def count(self, operator: Overload, args: Any) -> int:
        if operator in (aten.mm.default, aten.bmm.default, aten._grouped_mm.default):
            return product(args[0], args[1])
        if operator in (aten.addmm.default, aten.baddbmm.default):
            return product(args[1], args[2])
        if operator in (aten.mv.default, aten.addmv.default):  # of one row: see model/kernels.py
            matrix, vector = args[-2:]
            return product(matrix, vector[:, None])
        if str(operator).startswith("mkldnn._linear_pointwise"):
            x, weight, *_ = args
            return int(2 * prod(x.shape) * weight.shape[0])  # a packed weight has no transpose
        causal = self.convention == "causal"
        if operator is aten._scaled_dot_product_flash_attention_for_cpu.default:
            q, k, v, *_ = args
            is_causal = args[4:5] == (True,)  # not there where it is the default
            return attention(q, k, v, triangle=causal and is_causal)
        if operator is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            _, q, k, v, _, _, _, is_causal = args
            forward = attention(q, k, v, triangle=causal and is_causal)
            return forward // 2 * (5 if self.convention == "hardware" else 4)
        return 0


def on_meta(operator: Overload, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """The operator, anywhere; on meta also where it refuses what real devices do."""
    first, second = (*args, None, None)[:2]
    if isinstance(first, Tensor) and first.is_meta:
        if operator is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(first.shape, dtype=first.dtype)  # the gradient of a plain number
        if operator is aten._grouped_mm.default and first.dtype != torch.bfloat16:  # it knows no other dtype there
            assert isinstance(second, Tensor)
            narrow = [torch.empty_like(each, dtype=torch.bfloat16) for each in (first, second)]
            made = operator(*narrow, *args[2:], **kwargs)
            assert isinstance(made, Tensor)
            return torch.empty_like(made, dtype=first.dtype)
    return operator(*args, **kwargs)


@contextmanager
def fused_attention() -> Iterator[None]:
    """On meta, attention is one operator as on every other device; left alone, torch would take it apart there.

    Taken apart, selective checkpointing would not know it for what it keeps.
    """

    def fused(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: object,
    ) -> Tensor:
        if v.shape[-1] != q.shape[-1]:  # no fused operator takes them: latent attention is two products everywhere
            return original(q, k, v, attn_mask, dropout_p, is_causal, **more)  # type: ignore[arg-type]
        operator = aten._scaled_dot_product_flash_attention_for_cpu
        return operator(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]  # type: ignore[no-any-return]

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def inference_flops(
    config: ModelConfig, *, batch: int, length: int, cached: int | None, convention: str = "model"
) -> Counter[tuple[str, str]]:
    """One forward over `length` tokens that follow `cached` ones, or with no cache at all (None)."""
    with torch.device("meta"):
        model = GPT(config)
        tokens = torch.zeros(batch, length, dtype=torch.long)
    scope = Scope(layers_of(model))
    counter = FlopCounter(scope, convention=convention)
    with fused_attention(), scope.following(), counter:
        if cached is None:
            steps.decode_uncached(model, tokens, phase=scope)
        else:
            cache = KVCache(config, batch=batch, capacity=cached + length, dtype=model.dtype, device="meta")
            cache.rewind(cached)
            (steps.decode if cached else steps.prefill)(model, tokens, cache, phase=scope)
    return counter.flops


def by_phase(flops: Counter[tuple[str, str]]) -> dict[str, int]:
    phases: Counter[str] = Counter()
    for (phase, _), count in flops.items():
        phases[phase] += count
    phases.pop("outside", None)
    return dict(phases)


def count_training(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    accumulate: int = 1,
    checkpointing: str = "none",
    convention: str = "model",
    optim: OptimConfig | None = None,
    adapter: AdapterConfig | None = None,
) -> dict[str, int]:
    """FLOPs of one optimizer step, by phase."""
    with torch.device("meta"):
        model = GPT(config, checkpointing=checkpointing if convention == "hardware" else "none")
        adapt(model, adapter or AdapterConfig())
        tokens = torch.zeros(batch, length, dtype=torch.long)
    scope = Scope(layers_of(model))
    counter = FlopCounter(scope, convention=convention)
    optimizer = build(model, optim or OptimConfig())
    with fused_attention(), scope.following(), counter:
        steps.train_step(model, optimizer, tokens, tokens, accumulate=accumulate, phase=scope)
    return by_phase(counter.flops)


def count_prefill(config: ModelConfig, *, batch: int, length: int, convention: str = "model") -> int:
    """FLOPs of a forward over prompts of `length` tokens, the head at their last position alone."""
    return inference_flops(config, batch=batch, length=length, cached=0, convention=convention).total()


def count_decode(config: ModelConfig, *, batch: int, cached: int, convention: str = "model") -> int:
    """FLOPs of one more token for each sequence, looking at `cached` ones and itself."""
    return inference_flops(config, batch=batch, length=1, cached=cached, convention=convention).total()


def count_decode_uncached(config: ModelConfig, *, batch: int, length: int, convention: str = "model") -> int:
    """FLOPs of the same token where nothing is kept: all `length` tokens go through again."""
    return inference_flops(config, batch=batch, length=length, cached=None, convention=convention).total()
