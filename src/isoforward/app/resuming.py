"""The config of a run that is gone on with: as it began, so that nobody has to type it again."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isoforward.app.command_line import explain, typed, writable
from isoforward.base.config import TrainConfig
from isoforward.train.stopping import MAY_DIFFER, read_yaml


def as_it_began(config: TrainConfig) -> TrainConfig:
    """That of `config.run_dir`, with what was typed and may differ; `config` itself where more than that was typed."""
    kept = Path(config.run_dir) / "config.yaml"
    if not HydraConfig.initialized() or not kept.is_file():
        return config
    keys = [override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task]
    if not all(key.startswith(MAY_DIFFER) for key in keys):
        return config
    now: DictConfig = OmegaConf.structured(config)
    began = writable(TrainConfig)
    try:
        began.merge_with(OmegaConf.create(read_yaml(kept)))
        for key in ("run_dir", *keys):
            OmegaConf.update(began, key, OmegaConf.select(now, key))
    except OmegaConfBaseException as error:
        raise explain(error, TrainConfig) from error
    return typed(began, TrainConfig)
