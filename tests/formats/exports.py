"""A small model as after training, and what tests do with its export."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from isoforward.base.config import ModelConfig
from isoforward.base.errors import Refusal
from isoforward.model.gpt import GPT

TINY = ModelConfig(layers=2, heads=4, width=32, context=32, vocab=96)
TOKENS = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))


def trained(config: ModelConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """As after training: no bias is zero and no norm is one, so that nothing can be dropped unnoticed."""
    torch.manual_seed(seed)
    model = GPT(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model: GPT) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS)


def reseal(directory: Path, **changes: object) -> None:
    """A forger's manifest: every digest is right, whatever the files hold."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    if "files" not in changes:
        manifest["files"] = {
            name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in manifest["files"]
        }
    manifest.pop("sha256")
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": digest}))


def in_child(act: Callable[[], object]) -> int:
    """The exit code of a fork that does `act`, negative where a signal ended it."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        torch.set_num_threads(1)  # the threads of this process are not in its fork
        act()
        os._exit(0)
    except Refusal as refusal:
        os._exit(refusal.exit_code)
    finally:  # whatever else it raised
        os._exit(1)
