"""Weights read back: of an export, verified by its manifest, a Transformers directory, or a GGUF file.

Tensors come from safetensors or GGUF alone: a pickle is never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from isoforward import __version__
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import read_json, sha256_of
from isoforward.data.tokenizer import GENERATION, Tokenizer, end_ids
from isoforward.formats.checkpoint_file import is_checkpoint
from isoforward.formats.export import FORMAT, Manifest, allocate, digest_of, must_fit, unfilled
from isoforward.formats.gguf_format import read_gguf, read_tokenizer
from isoforward.formats.transformers_format import pieces, read_transformers
from isoforward.formats.transformers_tokenizer import has_foreign_tokenizer, read_foreign_tokenizer
from isoforward.formats.untrusted import FLOATS, Checkpoint, checked, names_in, open_file, shown
from isoforward.model.gpt import GPT


def load(path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> GPT:
    """Frozen, from an export, a Transformers directory, a safetensors file beside its config, or a GGUF file.

    `dtype` None keeps bf16; all else (16-bit floats of the other kind, 64 bits, a GGUF's blocks) is served in fp32.

    Integrity names the file or tensor that is not what it should be, BadInput what our forward does not do.
    """
    return build(find(path, verify=True), dtype=dtype, device=device).eval().requires_grad_(False)


def export_of(path: Path) -> Path:
    """The export in a run's directory; anything else is `path` itself."""
    inside = path / "export"
    return inside if (inside / "config.json").is_file() and not (path / "config.json").is_file() else path


def load_export(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer]:
    """What text is generated with: the frozen model, and the tokenizer beside it."""
    model, tokenizer = load(path, dtype=dtype, device=device), load_tokenizer(path)
    must_fit(tokenizer, model.config)
    return model, tokenizer


def load_trainable(path: Path, *, dtype: torch.dtype | None = None, checkpointing: str = "none") -> GPT:
    """To go on training from: fp32 masters under activations of `dtype`."""
    return build(find(path, verify=True), dtype=dtype, masters=torch.float32, checkpointing=checkpointing)


def load_tokenizer(directory: Path) -> Tokenizer:
    if is_gguf(directory):
        return read_tokenizer(directory)
    directory = directory.parent if directory.is_file() else directory
    path = directory / "tokenizer.json"
    configs = [directory / name for name in ("config.json", GENERATION)]  # the model's own win over its tokenizer's
    ends = [end for config in configs if config.is_file() for end in end_ids(read_json(config))]
    manifest = read_manifest(directory)
    if manifest is None and not path.is_file() and has_foreign_tokenizer(directory):
        return read_foreign_tokenizer(directory, ends=ends)
    if not path.is_file() or (manifest is not None and path.name not in manifest["files"]):
        raise BadInput(
            f"{directory} holds no tokenizer.json of its own (nor vocab.json and merges.txt, nor tokenizer.model), "
            "and text needs one"
        )
    return Tokenizer.load(path, ends=ends)


def build(
    found: Checkpoint,
    *,
    dtype: torch.dtype | None,
    masters: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    checkpointing: str = "none",
) -> GPT:
    """Every name and shape is compared before anything is allocated, so that a forged size costs nothing."""
    for name, tensor in found.tensors.items():
        if tensor.dtype not in FLOATS:
            raise Integrity(f"{tensor.file}: {shown(name)} holds {tensor.dtype}, which is none of {', '.join(FLOATS)}")
    if found.config.layers > len(found.tensors):
        raise Integrity(f"{found.where} claims {found.config.layers} layers and holds {len(found.tensors)} tensors")
    model = unfilled(found.config, dtype or torch.float32, checkpointing)
    wanted = {name: (*views[0].shape[:-1], sum(view.shape[-1] for view in views)) for name, views in pieces(model)}
    for name, shape in wanted.items():
        if name not in found.tensors:
            raise Integrity(f"{found.where}: the tensor {name} is missing")
        if (tensor := found.tensors[name]).shape != shape:
            raise Integrity(f"{tensor.file}: {name} is {tensor.shape}, its config asks for {shape}")
    if extra := sorted(found.tensors.keys() - wanted.keys()):
        raise Integrity(f"{found.tensors[extra[0]].file}: the tensor {shown(extra[0])} has no place in the model")
    stored = FLOATS[found.tensors[next(iter(wanted))].dtype]  # the embedding's
    model.dtype = dtype or (stored if stored == torch.bfloat16 else torch.float32)
    allocate(model, masters or model.dtype, device)
    with torch.no_grad():
        for name, views in pieces(model):
            whole, widths = found.tensors[name].read(), [view.shape[-1] for view in views]
            for view, part in zip(views, whole.split_with_sizes(widths, dim=-1), strict=True):
                view.copy_(part)
            if not all(is_finite(view) for view in views):
                raise BadInput(f"{found.tensors[name].file}: the tensor {name} is not finite (NaN or infinite)")
    return model


def is_finite(tensor: Tensor) -> bool:
    """A sum reads each number once and keeps none, and is not finite where one of them is not."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def find(path: Path, *, verify: bool = False) -> Checkpoint:
    """Of an export, a Transformers directory, one of the safetensors files in either, or a GGUF file.

    Tensors are not read yet; `verify` compares an export's files with their digests.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist{hub_hint(path)}")
    if is_gguf(path):
        return read_gguf(path)
    if is_checkpoint(path):
        raise BadInput(f"{path} is a training checkpoint, and an export is needed: take the run that it belongs to")
    if path.is_file() and not listed(path):
        tensors = open_file(path)
        if not (path.parent / "config.json").is_file():
            raise BadInput(f"{path} says nothing of its model: put the config.json of Transformers beside it")
        return read_transformers(path.parent, tensors)
    directory = path.parent if path.is_file() else path
    manifest = read_manifest(directory, verify)
    if manifest is None:
        return read_transformers(directory)
    try:
        config = checked(manifest["model"])
    except BadInput as error:
        raise Integrity(f"{directory / 'manifest.json'}: {error}") from error
    return Checkpoint(where=directory, config=config, tensors=open_file(directory / "model.safetensors"))


def is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf"
    with suppress(OSError), path.open("rb") as file:
        return file.read(4) == b"GGUF"
    return False


def listed(file: Path) -> bool:
    """Whether an export's manifest or an index of shards beside `file` speaks for it."""
    index = file.with_name("model.safetensors.index.json")
    if index.is_file():
        return file.name in str(read_json(index).get("weight_map"))
    return file.name == "model.safetensors" and file.with_name("manifest.json").is_file()


def hub_hint(path: str | Path) -> str:
    """What to do with a name of the Hugging Face Hub: nothing is downloaded unasked."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or Path(path).parts[0] in ("runs", "..", "."):
        return ""
    name = Path(path).name
    return (
        f"; if it is a model of the Hugging Face Hub, download it first: hf download {path} --local-dir {name}, "
        f"and give {name} instead"
    )


def read_manifest(directory: Path, verify: bool = False) -> Manifest | None:
    """What an export says of itself, or None where nothing does; `verify` compares its files with their digests."""
    path = directory / "manifest.json"
    if not path.is_file():
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise Integrity(
            f"{path} has format {shown(manifest.get('format'))}, of isoforward {shown(manifest.get('isoforward'))}; "
            f"this is isoforward {__version__}, which reads format {FORMAT}: take that version, or export again"
        )
    files, there = files_vouched_for(manifest, path, "model"), names_in(directory)
    for name in ("model.safetensors", "config.json", *files):
        if name not in files or name not in there:
            raise Integrity(f"{directory}: {shown(name)} is missing, there or in manifest.json")
        if verify:
            refuse_changed(directory / name, files[name])
    return cast(Manifest, manifest)  # which its own digest vouches for


def files_vouched_for(manifest: Mapping[str, object], path: Path, *beside: str) -> dict[str, object]:
    """Their digests, by name; the manifest has to have the tables `beside` them, too."""
    files, *others = (manifest.get(table) for table in ("files", *beside))
    if manifest.get("sha256") != digest_of(manifest) or not all(isinstance(table, dict) for table in (files, *others)):
        raise Integrity(f"{path} is damaged: it is not what its own digest says")
    return cast(dict[str, object], files)


def refuse_changed(path: Path, digest: object) -> None:
    if not path.is_file() or sha256_of(path) != digest:
        raise Integrity(f"{path} was damaged or changed: it is not what manifest.json says")
