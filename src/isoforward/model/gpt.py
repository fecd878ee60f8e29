"""The forward that both lives share: a decoder-only GPT, of whatever family its config describes.

Shapes: B batch, T query positions, S cached positions, C width, H heads, K key/value heads, D head width,
F ffn width, V vocabulary. H x D is C unless the config says otherwise.

Parameters are cast to the activations' dtype where they are used. Training keeps fp32 masters and pays that cast
on every step; an export stores the cast weights, so that the cast is free and the arithmetic, bit for bit, the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.model.kernels import Product, linear
from isoforward.model.rotary import Rotary, rotate


def cast(layer: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias. What is cast already is not asked again: at one row, each question costs as much as a sum."""
    weight, bias = layer.weight, layer.bias
    if weight.dtype == dtype:
        return weight, bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class Linear(nn.Linear):
    few_rows: Mapping[int, Product] = MappingProxyType({})  # for decode: kernels.use_kernels puts them there

    def reset_parameters(self) -> None:
        """GPT.initialise draws every weight, once."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *cast(self, x.dtype), self.few_rows)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """GPT.initialise draws every weight, once."""


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, *cast(self, x.dtype), self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RMSNorm1p(nn.RMSNorm):
    """Multiplies by 1 + weight, so that weight decay pulls towards one."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight.to(x.dtype), self.eps)


def norm(config: ModelConfig, width: int) -> nn.Module:
    arch = config.architecture
    if arch.norm == "layernorm":
        return LayerNorm(width, eps=config.norm_eps, bias=arch.biased("norm"))
    return {"rmsnorm": RMSNorm, "rmsnorm_1p": RMSNorm1p}[arch.norm](width, eps=config.norm_eps)


class KVCache:
    """Keys and values of every layer, allocated once for `capacity` positions.

    `padding` (B,) counts the unused slots at the left of each row, so that prompts of unlike lengths end together.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        padding: Tensor | None = None,
    ) -> None:
        if capacity > config.context:
            raise BadInput(f"{capacity} positions do not fit the model's context of {config.context}")
        shape = (batch, config.kv_head_count, capacity, config.head_width)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]  # (B, K, S, D) each
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.padding = padding
        self.length = 0

    def fill(self, value: float) -> None:
        """Every slot, whether it holds something or not."""
        for slots in (*self.keys, *self.values):
            slots.fill_(value)

    @property
    def fresh(self) -> bool:
        """Nothing is held yet: the next tokens see each other alone."""
        return self.length == 0 and self.padding is None

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def positions(self, count: int) -> Tensor:
        """Of the next `count` tokens: (T,), or (B, T) where rows are padded."""
        positions = torch.arange(self.length, self.length + count, device=self.keys[0].device)
        return positions if self.padding is None else (positions - self.padding[:, None]).clamp(min=0)

    def mask(self, count: int) -> Tensor | None:
        """True where a query may look: (T, S), or (B, 1, T, S) where rows are padded; None where it may look anywhere.

        `is_causal` of scaled_dot_product_attention aligns top-left and would blind a query that has a past.
        """
        if count == 1 and self.padding is None:
            return None
        keys = torch.arange(self.length + count, device=self.keys[0].device)
        queries = keys[self.length :, None]
        causal = keys <= queries
        if self.padding is None:
            return causal
        own = keys == queries  # a padding slot sees itself: a softmax over nothing would be NaN
        return ((keys >= self.padding[:, None, None, None]) & causal) | own

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes (B, K, T, D) twice; gives all that is cached so far, (B, K, S, D) twice."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise BadInput(f"the KV cache holds {self.capacity} positions and {end} are asked for")
        for slots, new in ((self.keys[layer], keys), (self.values[layer], values)):
            slots[:, :, self.length : end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, count: int) -> None:
        """The last `count` tokens have gone through every layer."""
        self.length += count

    def rewind(self, length: int) -> None:
        """As if only the first `length` positions were held, or, of slots that were filled, so many."""
        self.length = length

    def keep(self, rows: Tensor) -> None:
        """Drops every sequence but `rows`, so that finished ones stop costing."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        if self.padding is not None:
            self.padding = self.padding[rows]

    def unpad(self) -> int:
        """Moves out the padding that all rows have in common, so that positions alone fill the capacity; gives how
        many slots that were.
        """
        shared = 0 if self.padding is None else int(self.padding.min())
        if self.padding is not None and shared:
            self.padding = self.padding - shared
            for slots in (*self.keys, *self.values):
                slots[:, :, : self.length - shared] = slots[:, :, shared : self.length].clone()
            self.length -= shared
        return shared


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        arch = config.architecture
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_head_count, config.head_width
        self.widths = config.qkv_widths
        self.dropout = config.dropout
        self.attend: Callable[..., Tensor] | None = None  # in place of torch's own
        self.qkv = Linear(config.width, sum(self.widths), bias=arch.biased("qkv"))
        self.out = Linear(config.attention_width, config.width, bias=arch.biased("out"))
        self.qk_norm = arch.qk_norm
        if arch.qk_norm != "none":
            normed = [config.head_width] * 2 if arch.qk_norm == "head" else self.widths
            self.q_norm, self.k_norm = norm(config, normed[0]), norm(config, normed[1])

    def forward(
        self, x: Tensor, rotation: Tensor | None, cache: KVCache | None, layer: int, mask: Tensor | None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(B, T, self.heads, self.head_width)  # (B, T, H, D)
        k = k.view(B, T, self.kv_heads, self.head_width)  # (B, T, K, D)
        v = v.view(B, T, self.kv_heads, self.head_width).transpose(1, 2)  # (B, K, T, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        fresh = cache is None or cache.fresh
        if cache is not None:
            cached = cache.append(layer, k, v)
            if not fresh:
                k, v = cached  # (B, K, S, D)
        attend = self.attend or F.scaled_dot_product_attention
        y = attend(
            q,
            k,
            v,
            attn_mask=None if fresh else mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=fresh and T > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(y.transpose(1, 2).reshape(B, T, self.widths[0]))  # type: ignore[no-any-return]


class GeluMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.ffn_width, bias=config.architecture.biased("mlp"))
        self.down = Linear(config.ffn_width, config.width, bias=config.architecture.biased("mlp"))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Shazeer 2020, eq. 6; gate and up are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.ffn_width, bias=config.architecture.biased("mlp"))
        self.down = Linear(config.ffn_width, config.width, bias=config.architecture.biased("mlp"))

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activate(gate) * up)  # type: ignore[no-any-return]


class GeGLU(SwiGLU):
    def activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")


MLPS: dict[str, type[nn.Module]] = {"gelu": GeluMLP, "swiglu": SwiGLU, "geglu": GeGLU}


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = norm(config, config.width)
        self.mlp = MLPS[config.architecture.mlp](config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rotation: Tensor | None, cache: KVCache | None, layer: int, mask: Tensor | None
    ) -> Tensor:
        x = x + self.dropped(self.attention(self.attention_norm(x), rotation, cache, layer, mask))
        return x + self.dropped(self.mlp(self.mlp_norm(x)))

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class PostNormBlock(Block):
    """OLMo 2 (2024), section 3.1: norms on what is added to the residual stream, none on what is read from it."""

    def forward(
        self, x: Tensor, rotation: Tensor | None, cache: KVCache | None, layer: int, mask: Tensor | None
    ) -> Tensor:
        x = x + self.dropped(self.attention_norm(self.attention(x, rotation, cache, layer, mask)))
        return x + self.dropped(self.mlp_norm(self.mlp(x)))


BLOCKS = {"pre": Block, "post": PostNormBlock}


def plain(block: nn.Module, *inputs: object) -> Tensor:
    return block(*inputs)  # type: ignore[no-any-return]


def recompute_all(block: nn.Module, *inputs: object) -> Tensor:
    return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]


def recompute_cheap(block: nn.Module, *inputs: object) -> Tensor:
    """Keeps the outputs of matrix products and attention; recomputes norms and activations in between."""
    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


RUN_BLOCK: dict[str, Callable[..., Tensor]] = {"none": plain, "selective": recompute_cheap, "full": recompute_all}


class GPT(nn.Module):
    """`dtype` is that of the activations; parameters are fp32 until frozen. `checkpointing` changes backward alone."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, checkpointing: str = "none") -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.adapter = AdapterConfig()  # adapters.adapt sets it
        self.run_block = RUN_BLOCK[checkpointing]
        self.embedding = Embedding(config.vocabulary, config.width)
        arch = config.architecture
        self.positions = None if arch.rope else Embedding(config.context, config.width)
        self.rotary = Rotary(config) if arch.rope else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BLOCKS[arch.norm_position](config) for _ in range(config.layers))
        self.norm = norm(config, config.width)
        self.unembedding = Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.unembedding.weight = self.embedding.weight
        self.initialise()

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    def initialise(self) -> None:
        """GPT-2's: normal of 0.02, what is added to the residual stream scaled by 1/sqrt(2 layers); biases of 0."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue  # to be loaded, or never to hold anything
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def compile_blocks(self) -> None:
        """Block by block the compiler is done in less than half the time that all at once would take, and as good."""
        for block in self.blocks:
            block.compile()

    def trunk(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) to hidden (B, T, C); with a cache, tokens follow what it holds, which then holds them too."""
        T = tokens.shape[1]
        if self.config.context < T:
            raise BadInput(f"{T} positions are more than the model's context of {self.config.context}")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions(T)
        mask = None if cache is None else cache.mask(T)
        x = F.embedding(tokens, self.embedding.weight).to(self.dtype)
        if self.config.architecture.scaled_embedding:
            x = x * torch.tensor(math.sqrt(self.config.width), dtype=self.dtype)  # rounded first, as Transformers does
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions.weight).to(self.dtype)
        rotation = None if self.rotary is None else self.rotary(positions, self.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = self.run_block(block, x, rotation, cache, layer, mask)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) to logits (..., V)"""
        return self.unembedding(hidden)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) to logits (B, T, V)"""
        return self.head(self.trunk(tokens, cache))
