from typing import Any

import torch

from isoforward.base.config import OptimConfig, TrainerConfig
from isoforward.model.gpt import GPT
from isoforward.train.lightning_module import LitGPT
from tests.conftest import tiny


def test_a_checkpoint_says_what_its_weights_are() -> None:
    checkpoint: dict[str, Any] = {}
    LitGPT(GPT(tiny(), dtype=torch.bfloat16), OptimConfig(), TrainerConfig()).on_save_checkpoint(checkpoint)
    assert checkpoint["isoforward"]["precision"] == "bf16"
    assert checkpoint["isoforward"]["model"]["width"] == 32
