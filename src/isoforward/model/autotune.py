"""Which backward attention has in training in bf16 on a CPU: the quicker one, fused or plain.

It is measured once for each shape and kept, so that a seed gives the same weights again on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.base.caches import cache_directory
from isoforward.base.config import ModelConfig
from isoforward.base.errors import StorageFailed
from isoforward.base.hardware import cpu_model
from isoforward.base.storage import write_atomically
from isoforward.model.attention_kernels import attend_plainly
from isoforward.model.gpt import GPT

BATCH = 4  # sequences that are enough to tell
ROUNDS = 3
ENOUGH = 0.9  # of the fused time: what is nearly as quick is no reason to hold the whole square


def choose_backward(model: GPT, device: torch.device, *, batch: int, length: int) -> None:
    """For forwards of `batch` sequences on `device`. The forward itself stays the same to the bit."""
    if backward_of(model.config, model.dtype, device, batch=batch, length=length) == "plain":
        blocks: Any = model.blocks
        for block in blocks:
            block.attention.attend = attend_plainly


def backward_of(config: ModelConfig, dtype: torch.dtype, device: torch.device, *, batch: int, length: int) -> str:
    """fused or plain"""
    grouped = config.kv_head_count != config.heads
    if dtype != torch.bfloat16 or device.type != "cpu" or config.dropout or grouped or length < 2:
        return "fused"
    return measured_once((min(batch, BATCH), config.heads, length, config.head_width), torch.get_num_threads())


@cache
def measured_once(shape: tuple[int, int, int, int], threads: int) -> str:
    identity = [cpu_model(), torch.backends.cpu.get_cpu_capability(), torch.__version__, threads, shape]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    with suppress(StorageFailed, OSError, ValueError, KeyError):
        kept = cache_directory("attention", f"{name}.json")
        return "plain" if json.loads(kept.read_text())["quicker"] == "plain" else "fused"
    fused_s, plain_s = times_s(shape)
    quicker = "plain" if plain_s < ENOUGH * fused_s else "fused"
    about = {"quicker": quicker, "fused_s": fused_s, "plain_s": plain_s, "of": identity}
    with suppress(StorageFailed):  # measured again next time
        kept = cache_directory("attention", f"{name}.json")
        write_atomically(kept, lambda file: file.write(json.dumps(about, indent=2).encode()))
    return quicker


def times_s(shape: tuple[int, int, int, int]) -> tuple[float, float]:
    """The shortest of forward and backward, fused and plain in turns. No global random number is drawn."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(4))
    leaves = [each.requires_grad_() for each in (q, k, v)]

    def took_s(attend: Callable[..., Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(attend(*leaves, is_causal=True), leaves, gradient)
        return time.perf_counter() - start

    rounds = [(took_s(F.scaled_dot_product_attention), took_s(attend_plainly)) for _ in range(1 + ROUNDS)]
    fused_s, plain_s = zip(*rounds[1:], strict=True)
    return min(fused_s), min(plain_s)
