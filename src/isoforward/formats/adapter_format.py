"""A low-rank adapter alone, in PEFT's format, so that `peft` opens it on its base's export, and bound to that base.

adapter_config.json and adapter_model.safetensors are PEFT's; manifest.json has the digests of both and the fingerprint
of the base, since an adapter beside other weights computes nonsense without an error.

Where Transformers keeps as one matrix what we adapt apart (GPT-2's c_attn), the pairs lie in one pair of several times
the rank: the A's one above another, the B's each in the rows of its own map and 0 elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import read_json
from isoforward.formats.export import fingerprint, replacing, without_adapter, write_json, write_manifest
from isoforward.formats.families import FORMATS, written_as
from isoforward.formats.loading import files_vouched_for, refuse_changed
from isoforward.formats.transformers_format import a_head_each
from isoforward.formats.untrusted import open_file, shown
from isoforward.model.adapters import AdaptedLinear, adapt, hold_in_int8, linears_of
from isoforward.model.gpt import GPT

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def save_adapter(model: GPT, directory: Path) -> Path:
    """Whole or not at all. The fingerprint is that of the base as this model's forward sees it."""
    with replacing(directory) as stage, torch.no_grad():
        pairs = dict(pairs_of(model))
        tensors = {
            f"{PREFIX}{name}.lora_{letter}.weight": tensor.float().contiguous().cpu()
            for name, pair in pairs.items()
            for letter, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
        write_json(stage / CONFIG, peft_config(model, {name: len(a) for name, (a, _) in pairs.items()}))
        shutil.copymode(stage / CONFIG, stage / WEIGHTS)
        about = {"adapter": asdict(model.adapter), "precision": model.precision}
        write_manifest(stage, about | {"base": fingerprint(without_adapter(model))})
    return directory


def peft_config(model: GPT, ranks: Mapping[str, int]) -> dict[str, object]:
    """`ranks` by the names of modules; a pattern says which differ, and keeps alpha / rank what it is."""
    adapter, family = model.adapter, written_as(model.config)
    ranks = {".".join(name.split(".")[-2:]): rank for name, rank in ranks.items()}  # attn.c_proj is not mlp.c_proj
    other = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": {name: adapter.scale * rank for name, rank in other.items()},
        "fan_in_fan_out": family is not None and FORMATS[family].conv1d,
        "base_model_name_or_path": None,
    }


def pairs_of(model: GPT) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """A (rank, in) and B (out, rank) of every module that PEFT adapts, by its name in Transformers."""
    for path, layer in linears_of(model, AdaptedLinear):
        names = modules_of(model.config, path, layer)
        if len(names) == len(layer.rows):
            for part, beside in layer.pairs().items():
                yield names[part], (beside.a, beside.b)
        else:
            yield names["all"], joined(model.config, path, layer)


def modules_of(config: ModelConfig, path: str, layer: AdaptedLinear) -> dict[str, str]:
    """By the names of the layer's maps, or of all together."""
    family = written_as(config)
    names = [f"{path}.{part}" for part in layer.rows] if family is None else FORMATS[family].names.of(path)
    return dict(zip(layer.rows if len(names) == len(layer.rows) else ("all",), names, strict=True))


def joined(config: ModelConfig, path: str, layer: AdaptedLinear) -> tuple[Tensor, Tensor]:
    pairs = layer.pairs()
    a = torch.cat([beside.a for beside in pairs.values()])
    rank = len(a) // len(pairs)
    b = a.new_zeros(sum(layer.rows.values()), len(a))
    into = dict(zip(layer.rows, b.split_with_sizes([*layer.rows.values()]), strict=True))
    for place, (part, beside) in enumerate(layer.pairs().items()):
        into[part][:, place * rank : (place + 1) * rank] = beside.b
    return a, torch.cat(a_head_each(config, b.t()), dim=-1).t() if path.endswith("qkv") else b


def find_adapter(lora: str | Path) -> Path:
    """What `lora` means: the adapter in a run's directory, or else what it names itself."""
    path = Path(lora)
    if not path.exists():
        raise BadInput(f"lora={lora} does not exist")
    inside = path / "adapter"
    return inside if (inside / "manifest.json").is_file() else path


def read_manifest(directory: Path) -> dict[str, object]:
    path = directory / "manifest.json"
    if not path.is_file():
        raise BadInput(f"lora={directory} holds no adapter of python train.py adapter=lora (no manifest.json)")
    manifest = read_json(path)
    files = files_vouched_for(manifest, path)
    if "adapter" not in manifest:
        raise BadInput(f"lora={directory} is an export, not an adapter: write checkpoint={directory}")
    for name in (CONFIG, WEIGHTS):
        refuse_changed(directory / name, files.get(name))
    return manifest


def adapter_precision(directory: Path) -> str:
    """That it was trained in."""
    return str(read_manifest(directory).get("precision"))


def add_adapter(model: GPT, directory: Path) -> GPT:
    """In place, beside a frozen base. Integrity where it was trained beside other weights."""
    manifest = read_manifest(directory)
    about = manifest["adapter"]
    if not isinstance(about, dict):
        raise Integrity(f"{directory / 'manifest.json'} has no settings of an adapter")
    if about.get("base") == "int8":
        hold_in_int8(model)
    if fingerprint(without_adapter(model)) != manifest.get("base"):
        trained = shown(manifest.get("precision"))
        how = "" if trained == shown(model.precision) else f" in {trained}, and these are in {model.precision}"
        raise Integrity(
            f"lora={directory} belongs to another base: it was trained beside other weights{how}. A run's export has "
            "its adapter merged already: leave out lora=, or write checkpoint=BASE, which the adapter was trained on"
        )
    try:
        adapt(model, AdapterConfig(**about))
        held = {name: stored.read() for name, stored in open_file(directory / WEIGHTS).items()}
        for path, layer in linears_of(model, AdaptedLinear):
            fill(model.config, path, layer, held)
    except (KeyError, TypeError, RuntimeError) as error:
        raise Integrity(f"{directory / WEIGHTS} does not fit its model: {shown(str(error))}") from error
    return model.to(model.dtype).eval().requires_grad_(False)


def fill(config: ModelConfig, path: str, layer: AdaptedLinear, held: Mapping[str, Tensor]) -> None:
    names = modules_of(config, path, layer)
    for place, (part, beside) in enumerate(layer.pairs().items()):
        name = PREFIX + names.get(part, names.get("all", ""))
        a, b = (held[f"{name}.lora_{letter}.weight"] for letter in "AB")
        if "all" in names and len(layer.rows) > 1:
            own = slice(place * len(beside.a), (place + 1) * len(beside.a))
            each = config.attention_width  # rows of q, k and v where every query head has its own
            start = each * list(layer.rows).index(part)
            b = b[start : start + each, own]
            if part != "q":  # each key and value head once for every query head that reads it
                b = b.view(config.kv_head_count, -1, config.head_width, b.shape[-1])[:, 0].flatten(0, 1)
            a = a[own]
        beside.load_state_dict({"a": a, "b": b})
