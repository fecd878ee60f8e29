"""Two processes that train together over gloo: their rows, how they differ, and weights that are the same without."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from isoforward import phase_costs
from isoforward.attach import ranks
from isoforward.base.results import Results, select

SLOW_S = 0.02
STEPS = 16


def own_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train(rank: int, port: int, watched: bool) -> tuple[Mapping[str, torch.Tensor], Results | None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)))
    optimizer = torch.optim.AdamW(model.parameters())
    with phase_costs(model, optimizer, every=1, warmup=1) if watched else nullcontext() as costs:
        for step in range(STEPS):
            if rank == 1:
                time.sleep(SLOW_S)
            loss = model(torch.full((4, 8), float(rank + step)) + torch.arange(4.0)[:, None]).square().mean()
            loss.backward()
            total = loss.detach().clone()
            distributed.all_reduce(total)
            optimizer.step()
            optimizer.zero_grad()
        distributed.destroy_process_group()  # as a script does before it ends
    return model.module.state_dict(), None if costs is None else costs.phases.results


def child(rank: int, port: int, watched: bool, where: str) -> None:
    torch.set_num_threads(1)
    torch.save(train(rank, port, watched), f"{where}/{rank}.pt")


def trained(where: Path, *, watched: bool) -> list[Any]:
    where.mkdir()
    spawn(child, (own_port(), watched, str(where)), nprocs=2)
    return [torch.load(where / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_ranks_are_compared_and_the_weights_are_what_they_are_without_it(tmp_path: Path) -> None:
    (alone, _), _ = trained(tmp_path / "alone", watched=False)
    (weights, found), (_, of_other) = trained(tmp_path / "watched", watched=True)
    assert all(torch.equal(value, weights[name]) for name, value in alone.items())

    between = {row.phase: row for row in select(found, quantity="between processes")}
    assert between["residual"].conditions["rank"] == 1  # which sleeps there
    assert between["backward"].conditions["rank"] == 0  # which waits for it there
    assert {"communication", "forward", "optimizer"} <= between.keys()
    averaging = {row.conditions["how"]: row.value or 0.0 for row in select(found, quantity="averaging")}
    assert averaging["in all"] > 2 * averaging["beside the computation"] > 0.0  # most of it is waiting
    assert {row.life for row in found.rows} == {"training", "inference"}
    assert {row.life for row in of_other.rows} == {"training"}  # the other life is one process' affair
    assert not select(of_other, quantity="between processes")


class Store(dict[str, str]):
    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    set, get = dict.__setitem__, dict.__getitem__  # type: ignore[assignment]


def test_a_rank_that_is_not_watched_is_waited_for_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.1)
    first = ranks.Ranks(rank=0, count=2, store=Store(), name="x")
    first.leave({"step": 1.0})
    assert first.collect() == [{"step": 1.0}, None]


def test_who_trains_alone_asks_nobody() -> None:
    ranks.ALONE.leave({"step": 1.0})
    assert ranks.ALONE.collect() == []
    assert ranks.Ranks.known() is ranks.ALONE


def test_weights_that_are_sharded_are_known() -> None:
    plain, deepspeed = nn.Linear(2, 2), nn.Linear(2, 2)
    deepspeed.weight.ds_id = 1  # type: ignore[attr-defined]
    assert not ranks.sharded([plain])
    assert ranks.sharded([plain, deepspeed])


def test_a_store_that_is_gone_is_no_error_of_the_training() -> None:
    class Gone(Store):
        def set(self, key: str, value: str) -> None:  # type: ignore[override]
            raise torch.distributed.DistNetworkError("gone")

    ranks.Ranks(rank=1, count=2, store=Gone(), name="x").leave({"step": 1.0})
