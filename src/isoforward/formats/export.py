"""Frozen weights: made from a model in training, written as a checkpoint that Transformers opens, read back verified.

An export is a directory: model.safetensors, config.json, tokenizer.json and tokenizer_config.json as Transformers has
them, and manifest.json, which vouches for the rest and says what config.json cannot. A directory without a manifest is
read as a checkpoint of Transformers. Tensors come from safetensors alone: a pickle is never opened.

    isoforward import DIRECTORY_OR_GGUF OUT
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from isoforward import __version__
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity, Refusal, StorageFailed
from isoforward.base.storage import sha256_of, sync_directory
from isoforward.base.terminal import print_what_can_be_encoded
from isoforward.data.tokenizer import GENERATION, Tokenizer, end_ids
from isoforward.formats.checkpoint_file import is_checkpoint
from isoforward.formats.gguf_format import read_gguf, read_tokenizer
from isoforward.formats.model_card import about_weights, write_card
from isoforward.formats.transformers_format import pieces, read_transformers, to_transformers
from isoforward.formats.transformers_tokenizer import has_foreign_tokenizer, read_foreign_tokenizer
from isoforward.formats.untrusted import FLOATS, Checkpoint, checked, described, names_in, open_file, read_json, shown
from isoforward.model.adapters import AdaptedLinear, adapt, is_low_rank, linears_of
from isoforward.model.frozen_linear import FrozenLinear
from isoforward.model.gpt import GPT

FORMAT = 1
GGUF = ".gguf"


def freeze(model: GPT, *, dtype: torch.dtype | None = None) -> GPT:
    """A copy for serving: weights cast to `dtype`, or that of the model's activations; no dropout, no gradients.

    An adapter stays one, beside the frozen weights; `merged` makes it a part of them.
    """
    frozen = adapt(unfilled(model.config, dtype or model.dtype), model.adapter)
    allocate(frozen, frozen.dtype, model.embedding.weight.device)
    with torch.no_grad():
        for ours, theirs in zip(frozen.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    return frozen.eval().requires_grad_(False)


def merged(model: GPT) -> GPT:
    """The plain model that computes what this one does with its adapter, but for rounding: W + scale B A is one matrix.

    Itself where it has none.
    """
    if model.adapter.name != "lora":
        return model
    plain = without_adapter(model)
    with torch.no_grad():
        for path, layer in linears_of(model, AdaptedLinear):
            plain.get_parameter(f"{path}.weight").copy_(layer.merged_weight(model.dtype))
    return plain


def without_adapter(model: GPT) -> GPT:
    """A copy of the base, in fp32; of one in int8, what its forward sees."""
    base = unfilled(model.config, model.dtype)
    allocate(base, torch.float32, model.embedding.weight.device)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not is_low_rank(name)}
    for path, layer in linears_of(model, FrozenLinear):
        if kept.pop(f"{path}.scales", None) is not None:
            kept[f"{path}.weight"] = layer.seen_weight(model.dtype)
    base.load_state_dict(kept)
    return base


def fingerprint(model: GPT) -> str:
    """SHA-256 of the weights as the forward sees them: the same for a model in training, frozen, and loaded."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        seen = parameter.detach().to(model.dtype).cpu().contiguous()
        digest.update(f"{name} {seen.dtype} {tuple(seen.shape)}\n".encode())
        digest.update(seen.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unfilled(config: ModelConfig, dtype: torch.dtype, checkpointing: str = "none") -> GPT:
    """A model without memory of its own, and without drawing from the random generator."""
    with torch.device("meta"):
        return GPT(config, dtype=dtype, checkpointing=checkpointing)


def allocate(model: GPT, dtype: torch.dtype, device: torch.device | str) -> None:
    def filled(empty: Tensor) -> Tensor:
        own = dtype if empty.is_floating_point() else empty.dtype  # int8 stays what it is
        return torch.empty(empty.shape, dtype=own, device=device)

    model._apply(filled)  # type: ignore[no-untyped-call]  # to_empty would load sympy
    if model.config.tied:
        model.unembedding.weight = model.embedding.weight


class Manifest(TypedDict):
    """What manifest.json says, beside the digest of all this."""

    format: int
    isoforward: str
    model: dict[str, object]
    dtype: str
    parameters: int
    fingerprint: str
    files: dict[str, str]
    about: dict[str, object]


def export(
    model: GPT, directory: Path, *, tokenizer: Tokenizer | None, about: Mapping[str, object] | None = None
) -> Path:
    """Writes the frozen weights, an adapter merged, whole or not at all; an export from before is replaced at the end.

    `about` is kept in the manifest. BadInput where the tokenizer has more tokens than the model, or `directory` holds
    something else; StorageFailed where there is no room.
    """
    model = merged(model)
    if tokenizer is not None:
        must_fit(tokenizer, model.config)
    with replacing(directory) as stage:
        write_json(stage / "config.json", to_transformers(model.config, model.dtype, tokenizer))
        save_file(as_transformers(model), stage / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(stage / "config.json", stage / "model.safetensors")  # safetensors lets none but its writer read
        if tokenizer is not None:
            tokenizer.save(stage / "tokenizer.json", context=model.config.context)
        manifest: Manifest = {
            "format": FORMAT,
            "isoforward": __version__,
            "model": described(model.config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "fingerprint": fingerprint(model),
            "files": {path.name: sha256_of(path) for path in sorted(stage.iterdir())},
            "about": dict(about or {}),
        }
        write_json(stage / "manifest.json", manifest | {"sha256": digest_of(manifest)})
        write_card(stage, [weights_section(model, manifest)])
    return directory


def weights_section(model: GPT, manifest: Manifest) -> str:
    return about_weights(
        model.config,
        parameters=manifest["parameters"],
        dtype=manifest["dtype"],
        fingerprint=manifest["fingerprint"],
    )


def must_fit(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Rows of the embedding to spare are common, and so are tokens that were added without one: those cannot be fed,
    which is refused where a text asks for it.
    """
    if tokenizer.learnt > config.vocabulary:
        raise BadInput(f"the tokenizer has {tokenizer.learnt} tokens, the model only {config.vocabulary}")


def as_transformers(model: GPT) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            name: torch.cat([view.to(model.dtype) for view in views], dim=-1).contiguous().cpu()
            for name, views in pieces(model)
        }


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` to write into, which takes its place when all went well.

    No filesystem swaps two directories for Python: a kill between the two renames leaves the former one beside, hidden,
    where the next writer finds it.
    """
    directory = directory.resolve()
    if directory.exists() and not (directory / "manifest.json").is_file() and not is_empty_directory(directory):
        raise BadInput(f"{directory} is there and is no export; choose another place")
    stage = directory.with_name(f".{directory.name}.partial")
    former = directory.with_name(f".{directory.name}.former")

    def restore() -> None:
        if former.exists() and not directory.exists():
            former.replace(directory)

    try:
        restore()
        shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
        stage.mkdir(parents=True)
        yield stage
        for path in stage.iterdir():
            sync(path)
        sync_directory(stage)
        shutil.rmtree(former, ignore_errors=True)
        if directory.exists():
            directory.replace(former)
        stage.replace(directory)
        sync_directory(directory.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageFailed(f"{directory} could not be written: {reason}. Nothing there was changed") from error
    finally:
        restore()
        shutil.rmtree(former, ignore_errors=True)
        shutil.rmtree(stage, ignore_errors=True)


def is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def digest_of(manifest: Mapping[str, object]) -> str:
    canonical = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> GPT:
    """Frozen, from an export, a Transformers directory, a safetensors file beside its config, or a GGUF file.

    `dtype` None keeps bf16; all else (16-bit floats of the other kind, 64 bits, a GGUF's blocks) is served in fp32.

    Integrity names the file or tensor that is not what it should be, BadInput what our forward does not do.
    """
    return build(find(Path(directory), verify), dtype=dtype, device=device).eval().requires_grad_(False)


def load_export(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer]:
    """What text is generated with: the frozen model, and the tokenizer beside it."""
    model = load(directory, dtype=dtype, device=device)
    tokenizer = load_tokenizer(Path(directory))
    must_fit(tokenizer, model.config)
    return model, tokenizer


def load_trainable(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    checkpointing: str = "none",
) -> GPT:
    """To go on training from: fp32 masters under activations of `dtype`."""
    found = find(Path(directory), verify=True)
    return build(found, dtype=dtype, masters=torch.float32, device=device, checkpointing=checkpointing)


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


def find(path: Path, verify: bool) -> Checkpoint:
    """Of an export, a Transformers directory, one of the safetensors files in either, or a GGUF file."""
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
    if path.suffix == GGUF or not path.is_file():
        return path.suffix == GGUF
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
    files, model = manifest.get("files"), manifest.get("model")
    if manifest.get("sha256") != digest_of(manifest) or not isinstance(files, dict) or not isinstance(model, dict):
        raise Integrity(f"{path} is damaged: it is not what its own digest says")
    there = names_in(directory)
    for name in ("model.safetensors", "config.json", *files):
        if name not in files or name not in there:
            raise Integrity(f"{directory}: {shown(name)} is missing, there or in manifest.json")
        if verify and sha256_of(directory / name) != files[name]:
            raise Integrity(f"{directory / name} was damaged or changed: it is not what manifest.json says")
    return cast(Manifest, manifest)  # which its own digest vouches for


def main(arguments: list[str] | None = None) -> int:
    print_what_can_be_encoded()
    parser = argparse.ArgumentParser(prog="isoforward", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importing = commands.add_parser("import", help="turn a Transformers directory or a GGUF file into an export")
    importing.add_argument("source", type=Path, metavar="DIRECTORY_OR_GGUF")
    importing.add_argument("out", type=Path, metavar="OUT")
    asked = parser.parse_args(arguments)
    try:
        model, tokenizer = load_export(asked.source)
        export(model, asked.out, tokenizer=tokenizer, about={"imported_from": asked.source.name})
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    print(f"{asked.out}: {sum(p.numel() for p in model.parameters()):,} parameters in {model.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
