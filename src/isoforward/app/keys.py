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
CALLED_ELSEWHERE = {  # what other tools call our keys
    "data": "dataset",
    "data.batch": "batch_size",
    "data.length": "block_size max_length seq_len",
    "measure.new_tokens": "max_new_tokens",
    "model.context": "context_length max_seq_len",
    "model.ffn": "d_ff intermediate_size",
    "model.heads": "n_head num_attention_heads num_heads",
    "model.kv_heads": "num_key_value_heads",
    "model.layers": "n_layer num_hidden_layers num_layers",
    "model.vocab": "vocab_size",
    "model.width": "d_model dim hidden_size n_embd",
    "optim": "optimizer",
    "optim.clip": "grad_clip",
    "optim.lr": "learning_rate",
    "optim.warmup_steps": "warmup",
    "precision": "dtype",
    "run_dir": "out out_dir output output_dir",
    "tracking": "logger wandb",
    "trainer.accumulate": "grad_accum gradient_accumulation_steps",
    "trainer.devices": "devices",
    "trainer.max_steps": "epochs iters max_iters steps",
}
USUAL = {name: key for key, names in CALLED_ELSEWHERE.items() for name in names.split()}


def keys_of(schema: type, prefix: str = "") -> list[str]:
    keys = list[str]()
    for field in fields(schema):
        keys += keys_of(GROUPS[field.name], f"{field.name}.") if field.name in GROUPS else [prefix + field.name]
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
