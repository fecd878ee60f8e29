"""Training as several processes: rank 0 is the command that was typed, the others follow it and leave no trace.

Rank 0 starts those of its own machine, with its own config, so that a run is one run wherever it was typed: in a sweep
and under submitit too. Beyond one machine torchrun starts them all.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from isoforward.base.config import TrainConfig
from isoforward.base.device import best_device
from isoforward.base.errors import BadInput
from isoforward.base.subprocesses import Child, Failed
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT

ENDS_S = 1.0  # for a process to be seen to have ended, after its connections closed


def rank() -> int:
    """Among all processes of the run; 0 is the one that writes."""
    return int(os.environ.get("RANK", 0))


def refuse_what_cannot_be_shared(config: TrainConfig) -> None:
    plan = config.trainer
    started, asked = int(os.environ.get("WORLD_SIZE", 1)), plan.devices * plan.nodes
    if "TORCHELASTIC_RUN_ID" in os.environ and started != asked:
        raise BadInput(
            f"torchrun started {started} processes, and trainer.devices x trainer.nodes is {asked}; "
            f"write trainer.devices={os.environ.get('LOCAL_WORLD_SIZE', started)}"
        )
    if plan.devices == 1 and rank() == 0 and plan.strategy == "auto":
        return
    device = best_device(plan.accelerator)
    there = device.count()
    if there is not None and plan.devices > there:
        raise BadInput(f"trainer.devices={plan.devices}: {there} {device.kind} devices are here")
    if plan.strategy != "fsdp":
        return
    if config.optim.name == "muon":
        raise BadInput(
            "optim.name=muon needs whole matrices, which trainer.strategy=fsdp cuts up; write trainer.strategy=ddp or "
            "optim=adamw"
        )
    if plan.resume is not None:
        raise BadInput("trainer.resume does not go on under trainer.strategy=fsdp; write trainer.strategy=ddp")


def strategy_of(config: TrainConfig) -> str | Strategy:
    plan = config.trainer
    if plan.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=plan.devices * plan.nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    if plan.strategy == "ddp" or plan.devices * plan.nodes > 1:
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return "auto"


def environment() -> ClusterEnvironment:
    """Named, because Lightning would take the Slurm of a sweep's job for a cluster that it has to itself."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()


@contextmanager
def followers(config: TrainConfig, checkpoint: Path | None, train: Callable[[TrainConfig], None]) -> Iterator[None]:
    """Ranks 1 and on of this machine, for as long as this lasts; none where torchrun has started them.

    Each is `train` on this config, from this checkpoint, and is not reached by a terminal's Ctrl-C: rank 0 decides when
    to stop. All share the machine's cores evenly.
    """
    world = config.trainer.devices
    if world == 1 or "LOCAL_RANK" in os.environ:
        yield
        return
    threads = torch.get_num_threads()
    each = max(1, threads // world)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
    resume = None if checkpoint is None else str(checkpoint)
    theirs = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, resume=resume))
    before = dict(os.environ)
    try:
        with ExitStack() as ending:
            children = [
                ending.enter_context(Child(train, theirs, threads=each, env=shared | ranks(local), new_session=True))
                for local in range(1, world)
            ]
            os.environ.update(shared | ranks(0))
            torch.set_num_threads(each)
            try:
                yield
                for child in children:
                    child.outcome()
            except RuntimeError as error:  # of a collective that lost its partner
                wait_for_one(children)
                if ended := [child.outcome() for child in children if not child.running]:
                    raise BadInput(f"a process of this run ended: {'; '.join(map(last_words, ended))}") from error
                raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
        torch.set_num_threads(threads)


def wait_for_one(children: Sequence[Child[None]]) -> None:
    """Until one of them has ended: its connections close a little before that can be seen."""
    until = time.monotonic() + ENDS_S
    while all(child.running for child in children) and time.monotonic() < until:
        time.sleep(0.02)


def ranks(local: int) -> dict[str, str]:
    return {"RANK": str(local), "LOCAL_RANK": str(local)}


def last_words(outcome: object) -> str:
    return outcome.reason if isinstance(outcome, Failed) else "done"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shard(model: GPT, mesh: DeviceMesh) -> None:
    """Each block's parameters are gathered where it runs, and held in pieces elsewhere (Rajbhandari 2020, ZeRO-3)."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def travelling(strategy: Strategy, last: bool) -> Iterator[None]:
    """Whether the gradients of the backward inside are averaged over the processes."""
    if last or not isinstance(strategy, DDPStrategy):
        yield
    else:
        with strategy.block_backward_sync():
            yield


def whole(model: GPT) -> GPT:
    """The same weights in a model that is neither sharded nor compiled. All ranks call it together."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assembled = adapt(GPT(model.config, dtype=model.dtype), model.adapter)
    if state:  # of rank 0 alone
        assembled.load_state_dict(state)
    return assembled
