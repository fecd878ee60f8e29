"""Frozen weights: made from a model in training, and written as a checkpoint that Transformers opens.

An export is a directory: model.safetensors, config.json, tokenizer.json and tokenizer_config.json as Transformers has
them, and manifest.json, which vouches for the rest and says what config.json cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from isoforward import __version__
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, StorageFailed
from isoforward.base.storage import sha256_of, sync_directory
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.model_card import Said, about_weights, write_card
from isoforward.formats.transformers_format import pieces, to_transformers
from isoforward.formats.untrusted import described
from isoforward.model.adapters import AdaptedLinear, adapt, is_low_rank, linears_of
from isoforward.model.frozen_linear import FrozenLinear
from isoforward.model.gpt import GPT

FORMAT = 1


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


class Manifest(Said):
    files: dict[str, str]  # their digests


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
        said: Said = {
            "model": described(model.config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "fingerprint": fingerprint(model),
            "about": dict(about or {}),
        }
        write_manifest(stage, said)
        write_card(stage, [about_weights(model.config, said)])
    return directory


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
    empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not (directory / "manifest.json").is_file() and not empty:
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
            with path.open("rb") as file:
                os.fsync(file.fileno())
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


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_manifest(directory: Path, says: Mapping[str, object]) -> None:
    """Beside what it says: the digests of all files that are there, and its own."""
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    manifest = {"format": FORMAT, "isoforward": __version__, **says, "files": files}
    write_json(directory / "manifest.json", manifest | {"sha256": digest_of(manifest)})


def digest_of(manifest: Mapping[str, object]) -> str:
    canonical = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
