"""The analytic model: what a model's parameters, products, bytes and memory are, each formula once, with its source.

What follows from them on devices, in time and in money is economics.py's.

Letters: B sequences, T tokens of each, S tokens cached before them, L layers, C width, H heads, K key/value heads,
D head width, F ffn width, V vocabulary, N parameters. Counts are exact integers; a FLOP is a multiplication or an
addition, and only matrix products count, as torch's FlopCounterMode and PaLM count them.

Conventions for FLOPs, of which one is named in every comparison:
    model      the whole attention square, backward 2x forward, nothing for recomputation (PaLM, appendix B; nanoGPT)
    causal     as model, but only the T(T+1)/2 pairs that the mask leaves: slightly over half the square, and then
               decoding token by token costs exactly what one forward over the same tokens costs
    hardware   the whole square, recomputed activations, and flash attention's backward of 2.5x its forward

Published figures that do not follow from their own statement, and so are no check of this file: calflops' BLOOM and
Pythia rows (no head), llm-analysis' LLaMA-7B of 6.57G, FlashAttention figure 2's 66.6 GFLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

from isoforward.base.checks import at_least, one_of
from isoforward.base.config import ModelConfig
from isoforward.base.vocabulary import CONVENTIONS

KERNELS = ("flash", "math")  # of attention: one kernel that never stores the scores, or products and a softmax
CHECKPOINTING = ("none", "selective", "full")


class Lengths(TypedDict):
    """Of a training batch."""

    batch: int
    length: int


class Parts(dict[str, int]):
    """Amounts by part of the model."""

    @property
    def total(self) -> int:
        return sum(self.values())

    def __add__(self, other: Mapping[str, int]) -> Parts:
        return Parts({part: self.get(part, 0) + other.get(part, 0) for part in [*self, *other]})


# Parameters


class Matrix(NamedTuple):
    part: str
    inputs: int
    outputs: int
    biased: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


def block_matrices(config: ModelConfig) -> tuple[Matrix, ...]:
    """One layer's, as the model stores them: q, k, v in one, a gated MLP's gate and up in one."""
    C, F, arch = config.width, config.ffn_width, config.architecture
    return (
        Matrix("projections", C, sum(config.qkv_widths), arch.biased("qkv")),
        Matrix("projections", config.attention_width, C, arch.biased("out")),
        Matrix("mlp", C, (1 + arch.gated) * F, arch.biased("mlp")),
        Matrix("mlp", F, C, arch.biased("mlp")),
    )


def norm_parameters(config: ModelConfig) -> tuple[int, int]:
    """Of one layer's norms, those of queries and keys among them, and of the last one. A LayerNorm has biases too."""
    arch = config.architecture
    each = 1 + arch.biased("norm")
    normed = {"none": 0, "head": 2 * config.head_width, "width": sum(config.qkv_widths[:2])}[arch.qk_norm]
    return each * (2 * config.width + normed), each * config.width


def layer_parameters(config: ModelConfig) -> int:
    return norm_parameters(config)[0] + sum(m.weights + m.biased * m.outputs for m in block_matrices(config))


def parameters(config: ModelConfig) -> Parts:
    """As GPT-2 (Radford 2019, section 2.3), Llama (Touvron 2023, section 2.2) and what differs from them, exact.

    `embedding` is the token table and the learned positions; biases lie with their matrices; a tied head is 0, its
    weights being the embedding's (Press & Wolf 2017).
    """
    L, C = config.layers, config.width
    in_layer, last = norm_parameters(config)
    parts = Parts(embedding=(config.vocabulary + learned_positions(config)) * C, norm=L * in_layer + last)
    for matrix in block_matrices(config):
        parts += {matrix.part: L * (matrix.weights + matrix.biased * matrix.outputs)}
    return parts + {"head": 0 if config.tied else config.vocabulary * C}


def learned_positions(config: ModelConfig) -> int:
    """Rows of their table."""
    return 0 if config.architecture.rope else config.context


def non_embedding_parameters(config: ModelConfig) -> int:
    """Kaplan 2020's N (section 2.1): neither token table, positions nor head, tied or not."""
    parts = parameters(config)
    return parts.total - parts["embedding"] - parts["head"]


def matmul_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied by, the head among them, tied or not."""
    return config.layers * sum(m.weights for m in block_matrices(config)) + config.vocabulary * config.width


class Map(NamedTuple):
    """One linear map of a layer; several can lie in one of block_matrices."""

    name: str
    matrix: str  # the module that holds it
    part: str
    inputs: int
    outputs: int


def maps(config: ModelConfig) -> tuple[Map, ...]:
    """One layer's, in the order of its forward."""
    C, F, A, gated = config.width, config.ffn_width, config.attention_width, config.architecture.gated
    inward = "mlp.gate_up" if gated else "mlp.up"
    return (
        *(Map(name, "attention.qkv", "projections", C, n) for name, n in zip("qkv", config.qkv_widths, strict=True)),
        Map("out", "attention.out", "projections", A, C),
        *(Map(name, inward, "mlp", C, F) for name in (("gate", "up") if gated else ("up",))),
        Map("down", "mlp.down", "mlp", F, C),
    )


# FLOPs


def attention_pairs(*, length: int, cached: int = 0, convention: str = "model") -> int:
    """Query-key pairs of one sequence's `length` tokens that follow `cached` ones."""
    one_of("convention", convention, CONVENTIONS)
    at_least("length", length, 1)
    at_least("cached", cached, 0)
    return length * cached + (length * (length + 1) // 2 if convention == "causal" else length**2)


def _products(config: ModelConfig, *, tokens: int, pairs: int, logits: int) -> Parts:
    """A forward's FLOPs are linear in three counts: tokens through the blocks, query-key pairs, positions at the head.

    Two a weight and token (Kaplan 2020, table 1); scores and weighted values, 2 x 2HD a pair and layer (PaLM, appendix
    B), whatever K is: grouped heads share what they store, not what they compute. Looking up is no product.
    """
    L, C = config.layers, config.width
    parts = Parts(embedding=0, projections=0, scores=4 * config.attention_width * pairs * L, mlp=0)
    for matrix in block_matrices(config):
        parts += {matrix.part: 2 * tokens * L * matrix.weights}
    parts["head"] = 2 * logits * C * config.vocabulary
    return parts


def forward_flops(
    config: ModelConfig, *, batch: int, length: int, cached: int = 0, logits: str = "all", convention: str = "model"
) -> Parts:
    """`logits=all` is training's forward, `last` is prefill's; `length=1, cached=S` is a decode step."""
    one_of("logits", logits, ("all", "last"))
    at_least("batch", batch, 1)
    return _products(
        config,
        tokens=batch * length,
        pairs=batch * attention_pairs(length=length, cached=cached, convention=convention),
        logits=batch * (length if logits == "all" else 1),
    )


def recomputed_flops(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    kernel: str = "flash",
    checkpointing: str = "none",
    early_stop: bool = True,
) -> Parts:
    """What backward does again of the forward.

    full: every block (Narayanan 2021, eq. 3); torch's checkpoint stops at the input of the last product (`early_stop`),
    or, where dropout or a norm follows it, behind it.
    selective: what is not a matrix product, and attention where no flash kernel keeps its result (Korthikanti 2022, 5).
    """
    one_of("kernel", kernel, KERNELS)
    one_of("checkpointing", checkpointing, CHECKPOINTING)
    forward = forward_flops(config, batch=batch, length=length)
    if checkpointing == "full":
        last = 2 * batch * length * config.layers * block_matrices(config)[-1].weights
        last *= early_stop and not config.dropout and config.architecture.norm_position == "pre"
        return Parts(projections=forward["projections"], scores=forward["scores"], mlp=forward["mlp"] - last)
    return Parts(scores=forward["scores"] if checkpointing == "selective" and kernel == "math" else 0)


def backward_flops(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    convention: str = "model",
    kernel: str = "flash",
    checkpointing: str = "none",
    early_stop: bool = True,
) -> Parts:
    """Twice the forward: each product has a gradient for either operand (PaLM, appendix B), logits included.

    The first layer is no exception: its input gradient is what trains the embedding. Attention is 4 products for the
    forward's 2, and 5 where a flash kernel forms the scores again (FlashAttention-2, Dao 2023, section 4.1);
    `kernel` and `checkpointing` count under convention=hardware alone. Where a part alone is trained: adapter_cost.py.
    """
    forward = forward_flops(config, batch=batch, length=length, convention=convention)
    parts = Parts({part: 2 * flops for part, flops in forward.items()})
    if convention == "hardware":
        parts["scores"] = forward["scores"] // 2 * (5 if kernel == "flash" else 4)
        parts += recomputed_flops(
            config, batch=batch, length=length, kernel=kernel, checkpointing=checkpointing, early_stop=early_stop
        )
    return parts


def decode_flops(
    config: ModelConfig, *, batch: int, cached: int, cache: bool = True, convention: str = "model"
) -> Parts:
    """One more token for each sequence; without a cache all `cached` + 1 go through again, the head on the last."""
    if cache:
        return forward_flops(config, batch=batch, length=1, cached=cached, convention=convention)
    return forward_flops(config, batch=batch, length=cached + 1, logits="last", convention=convention)


def generation_flops(
    config: ModelConfig, *, batch: int, prompt: int, new: int, cache: bool = True, convention: str = "model"
) -> Parts:
    """`new` tokens after a prompt, in closed form. Prefill gives the first of them, so that `new` - 1 are decoded."""
    at_least("new", new, 1)
    tokens, pairs = prompt, attention_pairs(length=prompt, convention=convention)
    if cache:
        tokens += new - 1
        pairs += (new - 1) * prompt + new * (new - 1) // 2
    else:
        last = prompt + new - 1
        tokens = _sum(last) - _sum(prompt - 1)
        pairs = _sum_of_squares(last) - _sum_of_squares(prompt - 1)
        if convention == "causal":
            pairs = (pairs + tokens) // 2
    return _products(config, tokens=batch * tokens, pairs=batch * pairs, logits=batch * new)


def _sum(n: int) -> int:
    return n * (n + 1) // 2


def _sum_of_squares(n: int) -> int:
    return n * (n + 1) * (2 * n + 1) // 6


# The optimizer


class Update(NamedTuple):
    states: int  # numbers kept beside a parameter
    flops: int  # a parameter and step


UPDATES = {
    "sgd": Update(0, 2),  # w - lr g
    "momentum": Update(1, 4),  # m = mu m + g; w - lr m
    "adam": Update(2, 13),  # Kingma 2015, algorithm 1: m 3, v 4, root, its correction, epsilon, quotient, step 2
    "adamw": Update(2, 14),  # Loshchilov 2019, algorithm 2: and the decay of w
    "muon": Update(1, 10),  # Jordan 2024: m 2, Nesterov 2, Frobenius norm 3, decay, step 2; and Newton-Schulz
}


def newton_schulz_flops(rows: int, columns: int, *, steps: int = 5) -> int:
    """Muon's X -> aX + (bA + cA^2)X with A = XX', on the short side: 2(2nm^2 + m^3) a step, m <= n (Jordan 2024)."""
    m, n = sorted((rows, columns))
    return steps * 2 * (2 * n * m**2 + m**3)


def updated(config: ModelConfig, optimizer: str) -> dict[str, int]:
    """Parameters by the rule that updates them: under Muon all but the blocks' matrices take AdamW."""
    one_of("optimizer", optimizer, tuple(UPDATES))
    count = parameters(config).total
    if optimizer != "muon":
        return {optimizer: count}
    matrices = config.layers * sum(m.weights for m in block_matrices(config))
    return {"muon": matrices, "adamw": count - matrices}


def optimizer_flops(config: ModelConfig, *, optimizer: str = "adamw") -> Parts:
    """`products` are Newton-Schulz'; `elementwise` is counted by no dispatch counter, and bound by bytes."""
    elementwise = sum(UPDATES[rule].flops * count for rule, count in updated(config, optimizer).items())
    orthogonal = maps(config) if optimizer == "muon" else ()  # each apart, though several are stored as one
    products = sum(newton_schulz_flops(each.outputs, each.inputs) for each in orthogonal)
    return Parts(elementwise=elementwise, products=config.layers * products)


def optimizer_bytes(config: ModelConfig, *, optimizer: str = "adamw") -> int:
    """fp32, each tensor once: weight, gradient and states read, weight and states written; 28 a parameter for Adam.

    Newton-Schulz, in cache or not as the matrix is large, comes on top.
    """
    return sum(4 * (3 + 2 * UPDATES[rule].states) * count for rule, count in updated(config, optimizer).items())
