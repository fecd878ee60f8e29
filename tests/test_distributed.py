import os

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from isoforward.config import DataConfig, OptimConfig, TrainConfig, TrainerConfig
from isoforward.errors import BadInput
from isoforward.training.distributed import environment, followers, rank, refuse_what_cannot_be_shared


def config(**trainer):
    keys = {"accelerator": "cpu", "devices": 2, **trainer}
    return TrainConfig(trainer=TrainerConfig(**keys))


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused():
    with pytest.raises(BadInput, match=r"data\.batch=8 cannot be cut .* = 3 equal parts; write data\.batch=9"):
        TrainConfig(trainer=TrainerConfig(devices=3))
    with pytest.raises(BadInput, match=r"= 16 equal parts"):
        TrainConfig(data=DataConfig(batch=24), trainer=TrainerConfig(devices=2, nodes=2, accumulate=4))


def test_what_shards_cannot_do_is_refused_by_name():
    muon = TrainConfig(optim=OptimConfig(name="muon"), trainer=TrainerConfig(devices=2, strategy="fsdp"))
    with pytest.raises(BadInput, match=r"optim\.name=muon needs whole matrices.*trainer\.strategy=ddp"):
        refuse_what_cannot_be_shared(muon)
    with pytest.raises(BadInput, match=r"trainer\.resume .*fsdp"):
        refuse_what_cannot_be_shared(config(strategy="fsdp", resume="auto"))
    refuse_what_cannot_be_shared(config(strategy="ddp", resume="auto"))


def test_the_slurm_of_a_sweeps_job_is_not_taken_for_lightnings_own(monkeypatch):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "sweep", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect()
    assert type(environment()) is LightningEnvironment


def test_torchruns_processes_know_their_rank(monkeypatch):
    assert rank() == 0
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    assert rank() == 1
    assert TorchElasticEnvironment.detect()
    assert type(environment()) is TorchElasticEnvironment
    with followers(config(), None):  # torchrun has started them
        assert "MASTER_PORT" not in os.environ


def test_one_process_has_no_followers():
    before = dict(os.environ)
    with followers(config(devices=1), None):
        assert dict(os.environ) == before
