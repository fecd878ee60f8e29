"""What a model's weights, caches and activations weigh, what each phase moves, and the most that it holds at once.

Letters, and where parameters and products are counted: cost.py. Bytes are exact integers.
"""

from __future__ import annotations

from functools import partial

from isoforward.base.checks import one_of
from isoforward.base.config import ModelConfig
from isoforward.model.cost import (
    CHECKPOINTING,
    KERNELS,
    UPDATES,
    Parts,
    layer_parameters,
    matmul_weights,
    non_embedding_parameters,
    norm_parameters,
    optimizer_bytes,
    parameters,
    updated,
)

LOSS_SLICE = 2**20  # elements of the logits that the loss looks at together, on a CPU: what its cache holds
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def size_of(dtype: str) -> int:
    one_of("dtype", dtype, tuple(BYTES))
    return BYTES[dtype]


def weight_bytes(config: ModelConfig, *, dtype: str = "bf16") -> int:
    return size_of(dtype) * parameters(config).total


def kv_bytes(config: ModelConfig, *, batch: int = 1, length: int = 1, dtype: str = "bf16") -> int:
    """Keys and values of every layer, 2LKD a token (Shazeer 2019; grouped: Ainslie 2023).

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
) -> Parts:
    """Least traffic of one forward that follows `cached` tokens: `length=1` is a decode step, `cached=0` prefill.

    Weights once, however many the sequences (Pope 2022, section 2); the rows of the tables that are looked up; every
    cached key and value, the new ones with them, read, and the new ones written. Activations are left out.
    """
    C, tables = config.width, 2 - config.architecture.rope
    return Parts(
        weights=size_of(dtype) * (non_embedding_parameters(config) + config.vocabulary * C),
        embedding=size_of(dtype) * batch * length * tables * C,
        kv_read=kv_bytes(config, batch=batch, length=cached + length, dtype=dtype),
        kv_written=kv_bytes(config, batch=batch, length=length, dtype=dtype),
    )


def forward_bytes(config: ModelConfig, *, batch: int, length: int, dtype: str = "bf16") -> Parts:
    """Least traffic of a forward that keeps nothing: weights, rows that are looked up, and every logit written."""
    moved = inference_bytes(config, batch=batch, length=length, dtype=dtype)
    logits = size_of(dtype) * batch * length * config.vocabulary
    return Parts(weights=moved["weights"], embedding=moved["embedding"], logits=logits)


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
        loss=size_of(dtype) * logits,
        backward=saved + size_of(dtype) * matmul_weights(config) + masters + 3 * size_of(dtype) * logits,
        optimizer=optimizer_bytes(config, optimizer=optimizer),
    )


# What a training step keeps, and the most that each phase holds at once


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
    what matrix products and attention give. `cast` is the 16-bit copy of fp32 masters that each product saves, and the
    1 + weight of an rmsnorm_1p.
    `fused_norm`: RMSNorm is one kernel (CUDA), and does not keep an fp32 copy of its input and of its result.
    """
    one_of("kernel", kernel, KERNELS)
    one_of("checkpointing", checkpointing, CHECKPOINTING)
    e, arch, drops = size_of(dtype), config.architecture, config.dropout > 0
    C, A, H, KV, F = config.width, config.attention_width, config.heads, config.kv_width, config.ffn_width
    qkv, apart = A + 2 * KV, _queries_and_keys_apart(config) * (A + KV)
    if arch.norm == "layernorm" or fused_norm:
        statistics = 2 * e if arch.norm == "layernorm" else 4  # of a vector: deviation, and LayerNorm's mean
        norm, qk_norm = 2 * e * C + statistics, statistics * _qk_vectors(config)  # q and k are saved already
    else:
        norm = 8 * C + 4 + e * C
        qk_norm = (arch.qk_norm != "none") * (4 if dtype == "fp32" else 8) * (A + KV) + 4 * _qk_vectors(config)
    flash = e * (qkv + apart + A) + 4 * H  # q, k, v, normed or rotated q and k, result, log-sum-exp
    math = e * 4 * A + H * length * (e + drops * (e + 1))  # q, k, v, result; softmax, and it dropped, and which
    per_token = {
        "none": {
            "norm": 2 * norm + qk_norm,
            "attention": flash if kernel == "flash" else math,
            "mlp": e * F * (4 if arch.gated else 2),
            "dropout": 2 * C * drops,
        },
        "selective": {
            "norm": e * C,
            "attention": e * (qkv + C) + (e * A + 4 * H if kernel == "flash" else 0),
            "mlp": e * (F * (1 + arch.gated) + C),
        },
        "full": {"norm": e * C},
    }
    tokens = batch * length
    parts = Parts({kind: config.layers * tokens * kept for kind, kept in per_token[checkpointing].items()})
    parts += {"norm": tokens * norm, "dropout": tokens * C * drops}
    everything = checkpointing == "none"
    if dtype != "fp32":
        parts["cast"] = e * (matmul_weights(config) if everything else C * config.vocabulary)
    if dtype != "fp32" or arch.norm == "rmsnorm_1p":
        parts += {"cast": e * (parameters(config)["norm"] if everything else norm_parameters(config)[1])}
    return parts


def _queries_and_keys_apart(config: ModelConfig) -> bool:
    """Whether attention reads other queries and keys than the projection wrote."""
    return config.architecture.rope or config.architecture.qk_norm != "none"


def _qk_vectors(config: ModelConfig) -> int:
    """That a token's queries and keys are normed as."""
    return {"none": 0, "head": config.heads + config.kv_head_count, "width": 2}[config.architecture.qk_norm]


def rotary_bytes(config: ModelConfig) -> int:
    """Rotary frequencies, fp32: a buffer, no parameter."""
    return 2 * config.head_width * config.architecture.rope


def training_state(config: ModelConfig, *, optimizer: str = "adamw", mixed: bool = False) -> Parts:
    """fp32 AdamW is 4 + 4 + 8 = 16 bytes a parameter; `mixed` is ZeRO's 2 + 2 + 12, the fp32 master with the states
    (Rajbhandari 2020, section 3.1). Where a part alone is trained: adapter_cost.py.
    """
    count, e = parameters(config).total, 2 if mixed else 4
    states = sum((UPDATES[rule].states + mixed) * n for rule, n in updated(config, optimizer).items())
    return Parts(weights=e * count, gradients=e * count, optimizer=4 * states)


def _widest(config: ModelConfig, *, length: int, seen: int, kernel: str) -> int:
    """Elements that a block without gradients holds at its widest, for one sequence's `length` tokens."""
    C, A, F, KV = config.width, config.attention_width, config.ffn_width, config.kv_width
    stream = C * (2 if config.architecture.norm_position == "pre" else 1)  # the residual stream, and it normed
    apart = _queries_and_keys_apart(config) * (A + KV)
    attention = 2 * A + 2 * KV + apart + (2 * config.heads * seen if kernel == "math" else 0)
    return length * (stream + max(attention, C + F * (4 if config.architecture.gated else 2)))


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

    `batch` is a micro-batch's. The loss is fp32, a slice of the logits at a time, whatever they are; its gradient is as
    large as they. Backward is widest there, at the head, in its first or last block, or at its end. Memory within
    kernels and an unfused optimizer's temporaries are left out. Norms behind the MLP, and those of queries and keys
    under selective checkpointing, free what they saved a little sooner than is counted here (up to 3 % of the peak).
    """
    L, C, F, tokens = config.layers, config.width, config.ffn_width, batch * length
    part = 4 * config.vocabulary * min(tokens, max(1, LOSS_SLICE // config.vocabulary))
    e, logits, table = size_of(dtype), tokens * config.vocabulary, 4 * config.vocabulary * C
    how = partial(saved_bytes, config, batch=batch, length=length, dtype=dtype, kernel=kernel, fused_norm=fused_norm)
    saved, whole = how(checkpointing=checkpointing).total, how(checkpointing="none").total
    state = training_state(config, optimizer=optimizer)
    held, gradients = state["weights"] + state["optimizer"] + rotary_bytes(config), state["gradients"]
    before = held + (gradients if accumulate > 1 else 0)
    kept = before + saved
    to_come = 0 if accumulate > 1 else 4 * layer_parameters(config) + (not config.tied) * table
    block = e * ((L - 1) * tokens * C + batch * _widest(config, length=length, seen=length, kernel=kernel))
    in_mlp = e * tokens * F * (1 + config.architecture.gated) + (whole - saved) // L
    return {
        "forward": max(kept + e * logits, before + block if checkpointing == "full" else 0),
        "loss": kept + e * logits + 4 * tokens + (part if dtype != "fp32" else 0),
        "backward": max(
            kept + 2 * e * logits + 4 * tokens + part,
            kept + e * logits + table + e * tokens * C,
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
