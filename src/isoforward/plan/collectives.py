"""What an all-reduce takes here: over gloo, between processes of one thread each on this machine."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import torch
from torch import distributed

from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.plan.economics import collective_bytes

WORLD = 2
SIZES = (2**10, 2**14, 2**18, 2**20, 2**22, 2**24)  # bytes
REPEATS = 9


def all_reduce() -> dict[str, float] | None:
    """Seconds that each takes whatever its size, and bytes a second that each process sends; None without gloo."""
    with tempfile.TemporaryDirectory() as meeting, ThreadPoolExecutor(WORLD) as pool:
        store = f"file://{meeting}/store"
        told = list(pool.map(lambda rank: run_isolated(member, rank, store, threads=1, timeout_s=60), range(WORLD)))
    if any(isinstance(each, Failed) for each in told):
        return None
    sent = [collective_bytes("all_reduce", size, ways=WORLD) for size in SIZES]
    latency_s, byte_s = latency_and_rate(sent, [max(both) for both in zip(*told, strict=True)])
    return {"latency_s": latency_s, "bytes_per_s": 1 / byte_s}


def latency_and_rate(sent: list[float], took_s: list[float]) -> tuple[float, float]:
    """Seconds of a message of nothing, and of each byte more: the least relative squares."""
    took = np.array(took_s)
    parts = np.stack([np.ones(len(took)), np.array(sent)], axis=1) / took[:, None]
    latency_s, byte_s = np.linalg.lstsq(parts, np.ones(len(took)), rcond=None)[0]
    return max(float(latency_s), 0.0), float(byte_s)


def member(rank: int, store: str) -> list[float]:
    """Median seconds by size."""
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        return [took(torch.ones(size // 4)) for size in SIZES]
    finally:
        distributed.destroy_process_group()


def took(message: torch.Tensor) -> float:
    samples = []
    for _ in range(REPEATS + 1):
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce(message)
        samples.append(time.perf_counter() - start)
    return median(samples[1:])  # the first makes the connections
