"""Tokens -> batch k, a pure function of (seed, k): there is no place in an epoch to save, lose or restore."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from isoforward.base.errors import BadInput


def batch(
    tokens: np.ndarray[Any, Any], *, seed: int, step: int, batch: int, length: int, shard: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Batch `step` as int64 (B, T) tokens and the targets one place on: the same on any machine, in any process.

    The places come from a counter-based generator (Philox, Salmon et al. 2011) whose key is (seed, step). `shard` is
    (rank, world): rank r has rows r, r + world, ... of the one global batch.
    """
    places = len(tokens) - length
    draws = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch)
    return _windows(tokens, [int(draw) * places >> 64 for draw in draws][shard[0] :: shard[1]], length)


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item k is batch `start + k`; for a DataLoader with batch_size=None and any number of workers."""

    def __init__(
        self,
        tokens: np.ndarray[Any, Any],
        *,
        seed: int,
        batch: int,
        length: int,
        steps: int,
        start: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.tokens, self.seed, self.rows, self.length = tokens, seed, batch, length
        self.steps, self.start, self.shard = steps, start, shard

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        step = self.start + k
        return batch(self.tokens, seed=self.seed, step=step, batch=self.rows, length=self.length, shard=self.shard)


class ValidationBatches(Dataset[tuple[Tensor, Tensor]]):
    """The first windows of the validation part, in order and without overlap, `batch` at a time.

    All batches are equal in size, so that a mean of their means is the mean: what is left over at the end is not
    used, and a part that has fewer windows than `batch` is one smaller batch.
    """

    def __init__(
        self,
        tokens: np.ndarray[Any, Any],
        *,
        batch: int,
        length: int,
        count: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.tokens, self.length, self.shard = tokens, length, shard
        windows, world = (len(tokens) - 1) // length, shard[1]
        self.rows = min(batch, windows) // world * world
        if not self.rows:
            raise BadInput(
                f"the validation part has {len(tokens)} tokens; data.length={length} on {world} devices "
                f"needs at least {length * world + 1}"
            )
        self.count = windows // self.rows if count is None else min(count, windows // self.rows)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        rows = range(k * self.rows, (k + 1) * self.rows)[self.shard[0] :: self.shard[1]]
        return _windows(self.tokens, [row * self.length for row in rows], self.length)


def _windows(tokens: np.ndarray[Any, Any], starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
