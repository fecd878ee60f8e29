"""Several processes that train one model: how their phases differ, and what their communication takes.

Nothing of the training is changed, and no process waits for another in a collective: each leaves its medians in the
store that all of them met in, and rank 0 reads what is there.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from isoforward.attach.modules import alive

COMMUNICATION = "communication"
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
PATIENCE_S = 5.0  # that rank 0 waits for the others, which may not be watched
ASKED_EVERY_S = 0.05

_measurements = itertools.count()  # in this process; each rank makes as many


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that train together, as one of them knows them."""

    rank: int
    count: int
    store: Any  # None: alone
    name: str

    @classmethod
    def known(cls) -> Ranks:
        """Kept from the first step on: the process group may be gone when the training has ended."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return ALONE
        return cls(
            rank=distributed.get_rank(),
            count=distributed.get_world_size(),
            store=distributed.distributed_c10d._get_default_store(),
            name=f"isoforward/phases/{next(_measurements)}",
        )

    def leave(self, medians: Mapping[str, float]) -> None:
        if self.count > 1:
            with suppress(RuntimeError):  # rank 0 has ended, and the store with it
                self.store.set(f"{self.name}/{self.rank}", json.dumps(medians))

    def collect(self) -> list[dict[str, float] | None]:
        """Medians by phase, rank by rank; None of those that left none in time."""
        keys = [f"{self.name}/{rank}" for rank in range(self.count)] if self.count > 1 else []
        until = time.monotonic() + PATIENCE_S
        while not self.store_has(keys) and time.monotonic() < until:
            time.sleep(ASKED_EVERY_S)
        return [json.loads(self.store.get(key)) if self.store_has([key]) else None for key in keys]

    def store_has(self, keys: list[str]) -> bool:
        return not keys or bool(self.store.check(keys))


ALONE = Ranks(rank=0, count=1, store=None, name="")


def sharded(roots: Iterable[nn.Module]) -> bool:
    """By FSDP, as DTensors, or by DeepSpeed's third stage: a forward then waits for all processes."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(
        any(isinstance(module, FullyShardedDataParallel) for module in root.modules())
        or any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in root.parameters())
        for root in roots
    )


def gradients_averaged_s(roots: Iterable[nn.Module]) -> tuple[float, float] | None:
    """Mean seconds that DDP's own timers give: from a backward's first message to its last, and of that beside it.

    None where no model is one of DDP. What is not beside the computation, backward waits for: it is within `backward`.
    """
    weights = {id(weight) for root in roots for weight in root.parameters()}
    for one in alive():
        if isinstance(one, DistributedDataParallel) and any(id(weight) in weights for weight in one.parameters()):
            seen = one._get_ddp_logging_data()  # type: ignore[no-untyped-call]
            return seen["avg_backward_comm_time"] / 1e9, seen["avg_backward_compute_comm_overlap_time"] / 1e9
    return None
