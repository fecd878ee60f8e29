"""The keys of a command, and which of them was meant by one that it does not have."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from isoforward.base import config as schemas
from isoforward.base.errors import BadInput

GROUPS = {
    "model": schemas.ModelConfig,
    "data": schemas.DataConfig,
    "optim": schemas.OptimConfig,
    "adapter": schemas.AdapterConfig,
    "trainer": schemas.TrainerConfig,
    "measure": schemas.MeasureConfig,
    "tracking": schemas.TrackingConfig,
}
USUAL = {  # what other tools call them
    "batch_size": "data.batch",
    "block_size": "data.length",
    "context_length": "model.context",
    "d_ff": "model.ffn",
    "d_model": "model.width",
    "dataset": "data",
    "devices": "trainer.devices",
    "dim": "model.width",
    "dtype": "precision",
    "epochs": "trainer.max_steps",
    "grad_accum": "trainer.accumulate",
    "grad_clip": "optim.clip",
    "gradient_accumulation_steps": "trainer.accumulate",
    "hidden_size": "model.width",
    "intermediate_size": "model.ffn",
    "iters": "trainer.max_steps",
    "learning_rate": "optim.lr",
    "logger": "tracking",
    "max_iters": "trainer.max_steps",
    "max_length": "data.length",
    "max_new_tokens": "measure.new_tokens",
    "max_seq_len": "model.context",
    "n_embd": "model.width",
    "n_head": "model.heads",
    "n_layer": "model.layers",
    "num_attention_heads": "model.heads",
    "num_heads": "model.heads",
    "num_hidden_layers": "model.layers",
    "num_key_value_heads": "model.kv_heads",
    "num_layers": "model.layers",
    "optimizer": "optim",
    "out": "run_dir",
    "out_dir": "run_dir",
    "output": "run_dir",
    "output_dir": "run_dir",
    "seq_len": "data.length",
    "steps": "trainer.max_steps",
    "vocab_size": "model.vocab",
    "wandb": "tracking",
    "warmup": "optim.warmup_steps",
}


def keys_of(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for field in fields(schema):
        group = GROUPS.get(field.name)
        if group is None:
            keys.append(prefix + field.name)
        else:
            keys += keys_of(group, f"{field.name}.")
    return keys


def nearest(key: str, known: list[str]) -> str:
    """`did you mean`, or nothing: by its last part, by the name that other tools have for it, by its letters."""
    known = [*known, *dict.fromkeys(name.partition(".")[0] for name in known if "." in name)]
    last: dict[str, str] = {}
    for name in sorted(known, key=lambda name: "." in name):
        last.setdefault(name.rpartition(".")[2], name)
    own = key.rpartition(".")[2]
    near = [found for found in (last.get(own), USUAL.get(own)) if found in known]
    near = near or get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [last[m] for m in get_close_matches(own, list(last), n=1, cutoff=0.6)]
    return f"did you mean {near[0]}? " if near else ""


def unknown_key(key: str, schema: type) -> BadInput:
    return BadInput(f"{key}: no such key; {nearest(key, keys_of(schema))}--help lists them all")
