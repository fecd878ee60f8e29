from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from isoforward.base.errors import BadInput
from isoforward.data.batches import TrainingBatches, ValidationBatches, batch

COUNTED: Callable[[int], np.ndarray[Any, Any]] = lambda size: np.arange(size, dtype=np.uint16)  # noqa: E731


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40), rows=st.integers(1, 5), length=st.integers(1, 20))
def test_a_batch_is_whole_windows_with_the_targets_one_place_on(seed: int, step: int, rows: int, length: int) -> None:
    tokens, targets = batch(COUNTED(21), seed=seed, step=step, batch=rows, length=length)
    assert tokens.shape == targets.shape == (rows, length)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(length))
    again = batch(COUNTED(21), seed=seed, step=step, batch=rows, length=length)
    assert torch.equal(tokens, again[0])


def test_every_place_is_drawn_and_about_equally_often() -> None:
    first = torch.cat([batch(COUNTED(20), seed=7, step=k, batch=100, length=4)[0][:, 0] for k in range(100)])
    counts = torch.bincount(first, minlength=16)
    assert len(counts) == 16  # the last window's last target is the last token
    assert (counts - 625).abs().max() < 5 * 625**0.5


def test_steps_and_seeds_draw_different_batches() -> None:
    drawn = {
        tuple(batch(COUNTED(60_000), seed=seed, step=step, batch=4, length=1)[0].ravel().tolist())
        for seed in range(20)
        for step in range(20)
    }
    assert len(drawn) == 400


@given(world=st.integers(1, 4), step=st.integers(0, 1000))
def test_ranks_share_the_rows_of_the_one_global_batch(world: int, step: int) -> None:
    whole, _ = batch(COUNTED(500), seed=3, step=step, batch=12, length=5)
    for rank in range(world):
        part, _ = batch(COUNTED(500), seed=3, step=step, batch=12, length=5, shard=(rank, world))
        assert torch.equal(part, whole[rank::world])


def test_a_resumed_run_draws_what_the_uninterrupted_one_would_have() -> None:
    def drawn(start: int) -> list[Any]:
        batches = TrainingBatches(COUNTED(900), seed=5, batch=2, length=4, steps=10, start=start)
        return [tokens.tolist() for tokens, _ in DataLoader(batches, batch_size=None)]

    assert drawn(6) == drawn(0)[6:]


def test_validation_windows_are_in_order_without_overlap() -> None:
    batches = ValidationBatches(COUNTED(30), batch=2, length=4)  # 7 windows
    every = [batches[k] for k in range(len(batches))]
    assert [len(tokens) for tokens, _ in every] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([tokens for tokens, _ in every]).ravel(), torch.arange(28))
    assert all(torch.equal(targets, tokens + 1) for tokens, targets in every)
    assert batches.judged.tolist() == [*range(1, 29)]
    assert ValidationBatches(COUNTED(30), batch=2, length=4, windows=3).judged.tolist() == [*range(1, 13)]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6))
def test_what_is_judged_depends_on_no_batch_and_no_number_of_processes(windows: int, batch: int, world: int) -> None:
    def seen(rank: int, batch: int, world: int) -> list[list[int]]:
        shared = ValidationBatches(COUNTED(161), batch=batch, length=4, windows=windows, shard=(rank, world))
        mine = [shared[k][0] for k in range(len(shared))]
        assert all(0 < len(tokens) <= max(1, batch // world) + 1 for tokens in mine)
        return [tokens[:, 0].tolist() for tokens in mine]

    world = min(world, windows)
    shares = [seen(rank, batch, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # as many batches each: they wait for each other
    assert sorted(start for share in shares for rows in share for start in rows) == [*range(0, 4 * windows, 4)]


def test_a_validation_part_without_a_window_for_each_is_refused() -> None:
    assert ValidationBatches(COUNTED(9), batch=16, length=4, shard=(1, 2))[0][0].tolist() == [[4, 5, 6, 7]]
    for tokens, world in ((4, 1), (9, 3)):
        with pytest.raises(BadInput, match=f"{tokens} tokens"):
            ValidationBatches(COUNTED(tokens), batch=16, length=4, shard=(0, world))
