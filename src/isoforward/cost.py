"""The analytic model: what a model's parameters, products, bytes and memory are, each formula once, with its source.

What follows from them on devices, in time and in money is economics.py's.

Letters: B sequences, T tokens of each, S tokens cached before them, L layers, C width, H heads, K key/value heads,
F ffn width, V vocabulary, N parameters, D tokens trained on. Counts are exact integers; a FLOP is a multiplication or
an addition, and only matrix products count, as torch's FlopCounterMode and PaLM count them.

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
from functools import partial
from typing import NamedTuple

from isoforward.config import ModelConfig, at_least, one_of

CONVENTIONS = ("model", "causal", "hardware")
KERNELS = ("flash", "math")  # of attention: one kernel that never stores the scores, or products and a softmax
CHECKPOINTING = ("none", "selective", "full")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


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

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


def block_matrices(config: ModelConfig) -> tuple[Matrix, ...]:
    """One layer's, as the model stores them: q, k, v in one, a gated MLP's gate and up in one."""
    C, F, gates = config.width, config.ffn_width, 2 if config.family == "llama" else 1
    return (
        Matrix("projections", C, C + 2 * config.kv_width),
        Matrix("projections", C, C),
        Matrix("mlp", C, gates * F),
        Matrix("mlp", F, C),
    )


def parameters(config: ModelConfig) -> Parts:
    """GPT-2's (Radford 2019, section 2.3) or Llama's (Touvron 2023, section 2.2), exact.

    `embedding` is the token table and GPT-2's learned positions; biases lie with their matrices; a tied head is 0, its
    weights being the embedding's (Press & Wolf 2017).
    """
    L, C = config.layers, config.width
    positions = config.context if config.family == "gpt2" else 0
    shifts = config.family == "gpt2" and config.has_bias  # an RMSNorm has none
    parts = Parts(embedding=(config.vocabulary + positions) * C, norm=(2 * L + 1) * C * (1 + shifts))
    for matrix in block_matrices(config):
        parts += {matrix.part: L * (matrix.weights + config.has_bias * matrix.outputs)}
    return parts + {"head": 0 if config.tied else config.vocabulary * C}


def layer_parameters(config: ModelConfig) -> int:
    parts = parameters(config)
    final_norm = parts["norm"] // (2 * config.layers + 1)
    return (parts["projections"] + parts["mlp"] + parts["norm"] - final_norm) // config.layers


def non_embedding_parameters(config: ModelConfig) -> int:
    """Kaplan 2020's N (section 2.1): neither token table, positions nor head, tied or not."""
    parts = parameters(config)
    return parts.total - parts["embedding"] - parts["head"]


def matmul_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied by, the head among them, tied or not."""
    return config.layers * sum(m.weights for m in block_matrices(config)) + config.vocabulary * config.width


def lora_parameters(config: ModelConfig, *, rank: int) -> int:
    """Low-rank pairs beside every matrix of every layer (Hu 2021, section 4.1; on all of them: Dettmers 2023, 4)."""
    return config.layers * rank * sum(m.inputs + m.outputs for m in block_matrices(config))


# FLOPs


def attention_pairs(*, length: int, cached: int = 0, convention: str = "model") -> int:
    """Query-key pairs of one sequence's `length` tokens that follow `cached` ones."""
    one_of("convention", convention, CONVENTIONS)
    at_least("length", length, 1)
    at_least("cached", cached, 0)
    return length * cached + (length * (length + 1) // 2 if convention == "causal" else length**2)


def _products(config: ModelConfig, *, tokens: int, pairs: int, logits: int, lora_rank: int | None = None) -> Parts:
    """A forward's FLOPs are linear in three counts: tokens through the blocks, query-key pairs, positions at the head.

    Two a weight and token (Kaplan 2020, table 1); scores and weighted values, 2 x 2C a pair and layer (PaLM, appendix
    B), whatever K is: grouped heads share what they store, not what they compute. Looking up is no product.
    """
    L, C = config.layers, config.width
    parts = Parts(embedding=0, projections=0, scores=4 * C * pairs * L, mlp=0)
    for matrix in block_matrices(config):
        parts += {matrix.part: 2 * tokens * L * matrix.weights}
    parts["head"] = 2 * logits * C * config.vocabulary
    if lora_rank is not None:
        parts["adapter"] = 2 * tokens * lora_parameters(config, rank=lora_rank)
    return parts


def forward_flops(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    cached: int = 0,
    logits: str = "all",
    convention: str = "model",
    lora_rank: int | None = None,
) -> Parts:
    """`logits=all` is training's forward, `last` is prefill's; `length=1, cached=S` is a decode step."""
    one_of("logits", logits, ("all", "last"))
    at_least("batch", batch, 1)
    return _products(
        config,
        tokens=batch * length,
        pairs=batch * attention_pairs(length=length, cached=cached, convention=convention),
        logits=batch * (length if logits == "all" else 1),
        lora_rank=lora_rank,
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

    full: every block (Narayanan 2021, eq. 3); torch's checkpoint stops at the input of the last product (`early_stop`).
    selective: what is not a matrix product, and attention where no flash kernel keeps its result (Korthikanti 2022, 5).
    """
    one_of("kernel", kernel, KERNELS)
    one_of("checkpointing", checkpointing, CHECKPOINTING)
    forward = forward_flops(config, batch=batch, length=length)
    if checkpointing == "full":
        last = 2 * batch * length * config.layers * block_matrices(config)[-1].weights if early_stop else 0
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
    lora_rank: int | None = None,
) -> Parts:
    """Twice the forward: each product has a gradient for either operand (PaLM, appendix B), logits included.

    The first layer is no exception: its input gradient is what trains the embedding. Attention is 4 products for the
    forward's 2, and 5 where a flash kernel forms the scores again (FlashAttention-2, Dao 2023, section 4.1);
    `kernel` and `checkpointing` count under convention=hardware alone.
    With `lora_rank` the base is frozen: input gradients only, and none for the first layer's q, k, v, beneath which
    nothing is trained (exact for checkpointing=none).
    """
    forward = forward_flops(config, batch=batch, length=length, convention=convention, lora_rank=lora_rank)
    parts = Parts({part: 2 * flops for part, flops in forward.items()})
    if lora_rank is not None:
        tokens, first = batch * length, block_matrices(config)[0]
        parts |= {part: forward[part] for part in ("projections", "mlp", "head")}
        parts["projections"] -= 2 * tokens * first.weights
        parts["adapter"] -= 2 * tokens * first.inputs * lora_rank
    if convention == "hardware":
        parts["scores"] = forward["scores"] // 2 * (5 if kernel == "flash" else 4)
        parts += recomputed_flops(
            config, batch=batch, length=length, kernel=kernel, checkpointing=checkpointing, early_stop=early_stop
        )
    return parts


def korthikanti_hardware_flops(config: ModelConfig, *, batch: int, length: int, as_printed: bool = True) -> int:
    """A training step with attention recomputed, Korthikanti 2022, eq. 8 and its text, which differ.

    The equation's s/3h is three more forwards of attention (their published HFUs match it alone), the text's one
    recomputation would be 2s/9h. Our own convention=hardware, kernel=math, checkpointing=selective follows the text.
    """
    forward = forward_flops(config, batch=batch, length=length)
    return 3 * forward.total + (3 if as_printed else 1) * forward["scores"]


def palm_flops(config: ModelConfig, *, length: int, parameters_counted: int | None = None) -> int:
    """One sequence's training step as T(6N + 12LCT): PaLM, appendix B, and every MFU that follows it.

    N is without learned positions (nanoGPT) unless given; llm-foundry counts them too. Norms, biases and, untied, the
    token table are in N though no product: the difference from the exact count.
    """
    if parameters_counted is None:
        positions = config.context * config.width if config.family == "gpt2" else 0
        parameters_counted = parameters(config).total - positions
    return length * (6 * parameters_counted + 12 * config.layers * config.width * length)


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


def _updated(config: ModelConfig, optimizer: str) -> dict[str, int]:
    """Parameters by the rule that updates them: under Muon all but the blocks' matrices take AdamW."""
    one_of("optimizer", optimizer, tuple(UPDATES))
    count = parameters(config).total
    if optimizer != "muon":
        return {optimizer: count}
    matrices = config.layers * sum(m.weights for m in block_matrices(config))
    return {"muon": matrices, "adamw": count - matrices}


def optimizer_flops(config: ModelConfig, *, optimizer: str = "adamw") -> Parts:
    """`products` are Newton-Schulz'; `elementwise` is counted by no dispatch counter, and bound by bytes."""
    elementwise = sum(UPDATES[rule].flops * count for rule, count in _updated(config, optimizer).items())
    products = (
        sum(newton_schulz_flops(m.outputs, m.inputs) for m in block_matrices(config)) if optimizer == "muon" else 0
    )
    return Parts(elementwise=elementwise, products=config.layers * products)


def optimizer_bytes(config: ModelConfig, *, optimizer: str = "adamw") -> int:
    """fp32, each tensor once: weight, gradient and states read, weight and states written; 28 a parameter for Adam.

    Newton-Schulz, in cache or not as the matrix is large, comes on top.
    """
    return sum(4 * (3 + 2 * UPDATES[rule].states) * count for rule, count in _updated(config, optimizer).items())


# Bytes


def size_of(dtype: str) -> int:
    one_of("dtype", dtype, tuple(BYTES))
    return BYTES[dtype]


def weight_bytes(config: ModelConfig, *, dtype: str = "bf16") -> int:
    return size_of(dtype) * parameters(config).total


def kv_bytes(config: ModelConfig, *, batch: int = 1, length: int = 1, dtype: str = "bf16") -> int:
    """Keys and values of every layer, 2L(KC/H) a token (Shazeer 2019; grouped: Ainslie 2023).

    EleutherAI's calc_mem lacks the 2 and, as LLM-Viewer's flash decode, takes H for K.
    """
    return 2 * config.layers * config.kv_width * batch * length * size_of(dtype)


def inference_bytes(
    config: ModelConfig,
    *,
    batch: int,
    length: int = 1,
    cached: int = 0,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
) -> Parts:
    """Least traffic of one forward that follows `cached` tokens: `length=1` is a decode step, `cached=0` prefill.

    Weights once, however many the sequences (Pope 2022, section 2); the rows of the tables that are looked up; every
    cached key and value, the new ones with them, read, and the new ones written. Activations are left out.
    """
    C, tables, kv_dtype = config.width, 2 if config.family == "gpt2" else 1, kv_dtype or dtype
    return Parts(
        weights=size_of(dtype) * (non_embedding_parameters(config) + config.vocabulary * C),
        embedding=size_of(dtype) * batch * length * tables * C,
        kv_read=kv_bytes(config, batch=batch, length=cached + length, dtype=kv_dtype),
        kv_written=kv_bytes(config, batch=batch, length=length, dtype=kv_dtype),
    )


def training_bytes(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    dtype: str = "fp32",
    optimizer: str = "adamw",
    kernel: str = "flash",
    checkpointing: str = "none",
) -> Parts:
    """Least traffic of each phase of a step, an estimate from below: every tensor that outlives its kernel moves once.

    Forward reads the fp32 masters and writes what it saves; backward reads that and the weights and writes gradients.
    """
    saved = saved_bytes(
        config, batch=batch, length=length, dtype=dtype, kernel=kernel, checkpointing=checkpointing
    ).total
    masters, logits = weight_bytes(config, dtype="fp32"), batch * length * config.vocabulary
    return Parts(
        forward=masters + saved + size_of(dtype) * logits,
        loss=(size_of(dtype) + 4) * logits,
        backward=saved + size_of(dtype) * matmul_weights(config) + masters + (4 + 2 * size_of(dtype)) * logits,
        optimizer=optimizer_bytes(config, optimizer=optimizer),
    )


# Memory: what a training step keeps, and the most that each phase holds at once


def llmc_activations(config: ModelConfig, *, batch: int, length: int) -> int:
    """Elements, with every intermediate in a buffer of its own: llm.c train_gpt2.c, fill_in_activation_sizes.

    18LBTC + 2LBHT^2 + 4LBT + 2BTC + 3BT + 2BTV, where F = 4C and K = H; GPT-2's family.
    """
    L, C, BT = config.layers, config.width, batch * length
    layer = 8 * C + 2 * config.kv_width + 2 * config.ffn_width + 2 * config.heads * length + 4
    return BT * (L * layer + 2 * C + 3 + 2 * config.vocabulary)


def saved_bytes(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    dtype: str = "fp32",
    kernel: str = "flash",
    checkpointing: str = "none",
    fused_norm: bool = False,
) -> Parts:
    """What autograd keeps of our forward, from the embedding to the head, for backward.

    With kernel=math and dropout a 16-bit GPT-2 layer's are Korthikanti 2022, eq. 1: sbh(34 + 5as/h); with kernel=flash
    their selective recomputation's 34sbh (eq. 6); checkpointing=full leaves 2sbh (section 5). Our own selective keeps
    what matrix products and attention give. `cast` is the 16-bit copy of fp32 masters that each product saves.
    `fused_norm`: RMSNorm is one kernel (CUDA), and does not keep an fp32 copy of its input and of its result.
    """
    one_of("kernel", kernel, KERNELS)
    one_of("checkpointing", checkpointing, CHECKPOINTING)
    e, C, H, KV, F = size_of(dtype), config.width, config.heads, config.kv_width, config.ffn_width
    llama, drops = config.family == "llama", config.dropout > 0
    norm = e * 2 * C + (4 if llama else 2 * e)  # its input and output; deviation, and LayerNorm's mean
    if llama and not fused_norm:
        norm = 8 * C + 4 + e * C
    flash = e * (C + 2 * KV + llama * (C + KV) + C) + 4 * H  # q, k, v, rotated q and k, result, log-sum-exp
    math = e * 4 * C + H * length * (e + drops * (e + 1))  # q, k, v, result; softmax, and it dropped, and which
    per_token = {
        "none": {
            "norm": 2 * norm,
            "attention": flash if kernel == "flash" else math,
            "mlp": e * F * (4 if llama else 2),
            "dropout": 2 * C * drops,
        },
        "selective": {
            "norm": e * C,
            "attention": e * (2 * C + 2 * KV) + (e * C + 4 * H if kernel == "flash" else 0),
            "mlp": e * (F * (1 + llama) + C),
        },
        "full": {"norm": e * C},
    }
    tokens = batch * length
    parts = Parts({kind: config.layers * tokens * kept for kind, kept in per_token[checkpointing].items()})
    parts += {"norm": tokens * norm, "dropout": tokens * C * drops}
    if dtype != "fp32":
        cast = C * config.vocabulary + C * (1 + (config.has_bias and not llama))
        if checkpointing == "none":
            cast = matmul_weights(config) + parameters(config)["norm"]
        parts["cast"] = e * cast
    return parts


def rotary_bytes(config: ModelConfig) -> int:
    """Llama's table of cosines and sines, fp32: a buffer, no parameter."""
    return 8 * config.context * config.head_width if config.family == "llama" else 0


def training_state(
    config: ModelConfig, *, optimizer: str = "adamw", mixed: bool = False, lora_rank: int | None = None
) -> Parts:
    """fp32 AdamW is 4 + 4 + 8 = 16 bytes a parameter; `mixed` is ZeRO's 2 + 2 + 12, the fp32 master with the states.

    A frozen base (`lora_rank`) has neither gradients nor states; its adapters have (Rajbhandari 2020, section 3.1).
    """
    count, e = parameters(config).total, 2 if mixed else 4
    states = sum((UPDATES[rule].states + mixed) * n for rule, n in _updated(config, optimizer).items())
    if lora_rank is None:
        return Parts(weights=e * count, gradients=e * count, optimizer=4 * states)
    trained = lora_parameters(config, rank=lora_rank)
    return Parts(
        weights=e * (count + trained),
        gradients=e * trained,
        optimizer=4 * (UPDATES[optimizer].states + mixed) * trained,
    )


def _widest(config: ModelConfig, *, length: int, seen: int, kernel: str) -> int:
    """Elements that a block without gradients holds at its widest, for one sequence's `length` tokens."""
    C, F, KV, llama = config.width, config.ffn_width, config.kv_width, config.family == "llama"
    attention = 4 * C + 2 * KV + llama * (C + KV) + (2 * config.heads * seen if kernel == "math" else 0)
    return length * max(attention, 3 * C + F * (4 if llama else 2))


def training_peaks(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    dtype: str = "fp32",
    optimizer: str = "adamw",
    accumulate: int = 1,
    kernel: str = "flash",
    checkpointing: str = "none",
    fused_norm: bool = False,
) -> dict[str, int]:
    """The most bytes of tensors that each phase holds at once, from the second step on; the step's is their maximum.

    `batch` is a micro-batch's. The loss is fp32 whatever the logits are: a copy, log-probabilities, and in backward
    two gradients more of that size. Backward is widest there, in its first or last block, or at its end. Memory within
    kernels and an unfused optimizer's temporaries are left out.
    """
    L, C, F, tokens = config.layers, config.width, config.ffn_width, batch * length
    e, logits, table = size_of(dtype), tokens * config.vocabulary, 4 * config.vocabulary * C
    how = partial(saved_bytes, config, batch=batch, length=length, dtype=dtype, kernel=kernel, fused_norm=fused_norm)
    saved, whole = how(checkpointing=checkpointing).total, how(checkpointing="none").total
    state = training_state(config, optimizer=optimizer)
    held, gradients = state["weights"] + state["optimizer"] + rotary_bytes(config), state["gradients"]
    before = held + (gradients if accumulate > 1 else 0)
    kept = before + saved
    to_come = 0 if accumulate > 1 else 4 * layer_parameters(config) + (not config.tied) * table
    block = e * ((L - 1) * tokens * C + batch * _widest(config, length=length, seen=length, kernel=kernel))
    in_mlp = e * tokens * F * (2 if config.family == "llama" else 1) + (whole - saved) // L
    return {
        "forward": max(kept + e * logits, before + block if checkpointing == "full" else 0),
        "loss": kept + e * logits + (4 if dtype == "fp32" else 8) * logits,
        "backward": max(
            kept + 12 * logits,
            kept + table + 4 * C * F + in_mlp - e * tokens * C,  # with the final norm's already gone
            held + gradients - to_come + saved // L + in_mlp + e * tokens * C,
            held + gradients + 2 * config.tied * table,  # the embedding's gradient, and its sum with the head's
        ),
        "optimizer": held + gradients,
    }


def inference_peaks(
    config: ModelConfig, *, batch: int, prompt: int, new: int, dtype: str = "bf16", kernel: str = "flash"
) -> dict[str, int]:
    """Weights, a cache of prompt + new, and the widest moment of a block, or of the head at one position a sequence."""
    held = weight_bytes(config, dtype=dtype) + rotary_bytes(config)
    held += kv_bytes(config, batch=batch, length=prompt + new, dtype=dtype)
    prefill = _widest(config, length=prompt, seen=prompt, kernel=kernel)
    decode = _widest(config, length=1, seen=prompt + new, kernel=kernel)
    return {
        "prefill": held + size_of(dtype) * batch * max(prefill, config.vocabulary),
        "decode": held + size_of(dtype) * batch * max(decode, config.vocabulary),
    }
