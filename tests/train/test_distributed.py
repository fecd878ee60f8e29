import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from isoforward.app.train import train
from isoforward.base.config import DataConfig, OptimConfig, TrainConfig, TrainerConfig
from isoforward.base.errors import BadInput
from isoforward.base.subprocesses import Child
from isoforward.formats import checkpoint_file
from isoforward.train.distributed import environment, followers, free_port, rank, refuse_what_cannot_be_shared
from tests.kill import TEXT, same


def config(**trainer: Any) -> TrainConfig:
    keys = {"accelerator": "cpu", "devices": 2, **trainer}
    return TrainConfig(trainer=TrainerConfig(**keys))


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused() -> None:
    with pytest.raises(BadInput, match=r"data\.batch=8 cannot be cut .* = 3 equal parts; write data\.batch=9"):
        TrainConfig(trainer=TrainerConfig(devices=3))
    with pytest.raises(BadInput, match=r"= 16 equal parts"):
        TrainConfig(data=DataConfig(batch=24), trainer=TrainerConfig(devices=2, nodes=2, accumulate=4))


def test_what_shards_cannot_do_is_refused_by_name() -> None:
    muon = TrainConfig(optim=OptimConfig(name="muon"), trainer=TrainerConfig(devices=2, strategy="fsdp"))
    with pytest.raises(BadInput, match=r"optim\.name=muon needs whole matrices.*trainer\.strategy=ddp"):
        refuse_what_cannot_be_shared(muon)
    with pytest.raises(BadInput, match=r"trainer\.resume .*fsdp"):
        refuse_what_cannot_be_shared(config(strategy="fsdp", resume="auto"))
    refuse_what_cannot_be_shared(config(strategy="ddp", resume="auto"))


def test_the_slurm_of_a_sweeps_job_is_not_taken_for_lightnings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "sweep", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect()
    assert type(environment()) is LightningEnvironment


def test_torchruns_processes_know_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank() == 0
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    assert rank() == 1
    assert TorchElasticEnvironment.detect()
    assert type(environment()) is TorchElasticEnvironment
    with followers(config(), None, train):  # torchrun has started them
        assert "MASTER_PORT" not in os.environ


def test_one_process_has_no_followers() -> None:
    before = dict(os.environ)
    with followers(config(devices=1), None, train):
        assert dict(os.environ) == before


def leave(_: TrainConfig) -> None:
    os._exit(7)


@pytest.mark.usefixtures("processes_start_at_once")
def test_a_follower_that_ended_is_named_where_a_collective_lost_its_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = dict(os.environ), torch.get_num_threads()
    started: list[Child[None]] = []
    monkeypatch.setattr(Child, "__enter__", lambda child: started.append(child) or child)
    with (
        pytest.raises(BadInput, match="a process of this run ended: ended with code 7 and said nothing"),
        followers(config(), None, leave),
    ):
        assert os.environ["RANK"] == "0"
        os.waitid(os.P_PID, started[0].process.pid, os.WEXITED | os.WNOWAIT)
        raise RuntimeError("Connection closed by peer")
    assert (dict(os.environ), torch.get_num_threads()) == (before, threads)


def under_torchrun(where: Path, run: str, *more: str) -> subprocess.Popen[bytes]:
    keys: dict[str, dict[str, object]] = {
        "model": {"layers": 1, "heads": 2, "width": 16, "context": 16, "dropout": 0.2},
        "data": {"source": "text", "path": where / "text.txt", "tokenizer": "char", "batch": 4, "length": 8},
        "trainer": {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "max_steps": 600, "checkpoint_every": 20},
    }
    typed = [f"{group}.{key}={value}" for group, pairs in keys.items() for key, value in pairs.items()]
    typed += ["measure.enabled=false", "tracking.mode=none", "sample_prompt=To", f"run_dir=runs/{run}", *more]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    script = Path(__file__).parents[2] / "train.py"
    cache = {"XDG_CACHE_HOME": str(where / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(script), *typed], cwd=where, env={**os.environ, **cache})


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["adapter=lora", "adapter.base=int8", "trainer.accumulate=2"]], ids=["full", "adapter"]
)
def test_torchrun_passes_a_signal_on_and_the_run_goes_on_from_there_to_the_same_bits(
    more: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert under_torchrun(tmp_path, "whole", *more).wait() == 0
    cut = under_torchrun(tmp_path, "cut", *more)
    while not list(tmp_path.glob("runs/cut/checkpoints/last-*.ckpt")):
        time.sleep(0.05)
    cut.send_signal(signal.SIGTERM)
    assert cut.wait() != 0
    (stopped,) = tmp_path.glob("runs/cut/checkpoints/last-*.ckpt")
    assert stopped.name < "last-000600.ckpt"
    assert under_torchrun(tmp_path, "cut", *more, "trainer.resume=runs/cut").wait() == 0
    whole, gone_on = (
        checkpoint_file.load(tmp_path / "runs" / run / "checkpoints" / "last-000600.ckpt", only=("state_dict",))
        for run in ("whole", "cut")
    )
    assert same(whole, gone_on)
