"""Tokens -> batch k, a pure function of (seed, k): there is no place in an epoch to save, lose or restore."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from isoforward.base.errors import BadInput


def batch(
    tokens: npt.NDArray[np.generic], *, seed: int, step: int, batch: int, length: int, shard: tuple[int, int] = (0, 1)
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
        tokens: npt.NDArray[np.generic],
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
    """The first `windows` windows of the validation part (None: all), in order and without overlap.

    Which text that is depends neither on `batch`, the windows that are looked at together over all processes, nor on
    `shard`. Where they do not come out even some batches have another number of rows: weigh each by its own.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.generic],
        *,
        batch: int,
        length: int,
        windows: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        there, (rank, world) = (len(tokens) - 1) // length, shard
        self.tokens, self.length = tokens, length
        self.windows = there if windows is None else min(windows, there)
        if there < world:
            raise BadInput(
                f"the validation part has {len(tokens)} tokens; data.length={length} on {world} devices "
                f"needs at least {length * world + 1}"
            )
        mine = range(rank, self.windows, world)
        most, least = math.ceil(self.windows / world), self.windows // world  # of any process
        together = max(1, batch // world)
        self.batches = np.array_split(mine, min(math.ceil(most / together), least))  # as many each: they wait for each

    @property
    def judged(self) -> npt.NDArray[np.generic]:
        """The tokens that are predicted, over all processes."""
        return self.tokens[1 : self.windows * self.length + 1]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return _windows(self.tokens, [int(row) * self.length for row in self.batches[k]], self.length)


def _windows(tokens: npt.NDArray[np.generic], starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
