"""Checkpoints of Transformers: their config.json and their tensors, both ways, by the table in families.py."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import read_json
from isoforward.data.tokenizer import Tokenizer, one_or_all
from isoforward.formats.families import FORMATS, Format, written_as
from isoforward.formats.rope_format import rope_from_transformers, rope_to_transformers
from isoforward.formats.untrusted import Checkpoint, Stored, checked, open_tensors, shown
from isoforward.model.gpt import GPT

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # that old Transformers saved as if weights


def pieces(model: GPT) -> Iterator[tuple[str, list[Tensor]]]:
    """Every tensor of a checkpoint by name, as views of our parameters; the embedding comes first.

    Joined along their last dimension, the views are the tensor; filled from it, they load it. What GPT-2 always has
    and our model lacks (biases, a key and a value head for each query head) is zeros that nothing refers to, or the
    same view several times. A model that no class of Transformers computes keeps our own names.
    """
    config, family = model.config, written_as(model.config)
    if family is None:
        for name, parameter in model.named_parameters():
            yield name, [parameter]
        return
    form = FORMATS[family]
    for path, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None or (path == "unembedding" and config.tied):
            continue
        names = form.names.of(path)
        if form.conv1d and path not in ("embedding", "positions", "unembedding"):
            weight = weight.t()  # Conv1D keeps (in, out), a linear keeps (out, in); a norm has one dimension
            bias = weight.new_zeros(weight.shape[-1]) if bias is None else bias
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if form.conv1d and path.endswith("qkv"):
                yield f"{names[0]}.{kind}", a_head_each(config, tensor)
            else:
                rows = config.fused_rows[path.rpartition(".")[2]] if len(names) > 1 else [len(tensor)]
                for name, part in zip(names, tensor.split_with_sizes(rows), strict=True):
                    yield f"{name}.{kind}", [part]


def a_head_each(config: ModelConfig, qkv: Tensor) -> list[Tensor]:
    """Grouped keys and values, once for every query head that reads them."""
    q, k, v = qkv.split_with_sizes(config.qkv_widths, dim=-1)
    shared_by = config.heads // config.kv_head_count
    return [q] + [head for part in (k, v) for head in part.chunk(config.kv_head_count, -1) for _ in range(shared_by)]


def to_transformers(config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, object]:
    """config.json, in the spelling that Transformers 4 and 5 both read."""
    family = written_as(config)
    shared = {
        "model_type": family or "isoforward",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer and tokenizer.start,
        "eos_token_id": tokenizer and one_or_all(tokenizer.ends),
    }
    if family is None:
        return shared  # the rest is in manifest.json
    form = FORMATS[family]
    own = {"ffn": config.ffn_width, "head_dim": config.head_width, "kv_heads": config.kv_head_count}
    values = {theirs: own.get(ours, getattr(config, ours)) for ours, theirs in form.keys.items()}
    written = {"architectures": [form.architectures[0]], **shared, **values, **form.written}
    if form.conv1d:
        return written | dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.dropout)
    flags = next((flags for flags, bias in form.biases.items() if bias == config.architecture.bias), ())
    return written | dict(zip(form.bias_keys, flags, strict=True)) | rope_to_transformers(config)


def from_transformers(raw: Mapping[str, object], directory: Path = Path("DIRECTORY")) -> ModelConfig:
    """Reads the config.json of `directory`; BadInput names what our forward does not do."""
    family = raw.get("model_type")
    form = FORMATS.get(family) if isinstance(family, str) else None
    named = raw.get("architectures") or (form and [form.architectures[0]])
    if form is None or not isinstance(named, list) or not set(map(str, named)) <= set(form.architectures):
        refuse_contradictions(family, named)
        known = ", ".join(form.architectures[0] for form in FORMATS.values())
        of_type = f" (model_type {shown(family)})" if isinstance(family, str) else ""
        as_it_is = f"isoforward phase_costs model=transformers model.path={shlex.quote(str(directory))}"
        raise BadInput(
            f"architecture {shown(named or family)}{of_type} is not one we implement: {known} are; "
            f"to measure it as it is: {as_it_is}"
        )
    for key, allowed in form.fixed.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise BadInput(f"{key}={shown(raw[key])} is not what our {family} does, which is {shown(allowed[0])}")
    try:
        values = {
            ours: raw.get(theirs, form.defaults[ours]) if ours in form.defaults else raw[theirs]
            for ours, theirs in form.keys.items()
        }
        if not form.conv1d:
            values |= bias_of(raw, form) | rope_from_transformers(raw)
            refuse_short_windows(raw, str(family), values["context"])
        config = checked({"family": family} | values)
    except KeyError as error:
        raise BadInput(f"{error.args[0]} is missing") from error
    if config.head_dim is not None and config.head_dim * config.heads == config.width:
        return replace(config, head_dim=None)
    return config


def refuse_contradictions(family: object, named: object) -> None:
    """Where what the file names is implemented, but not as one."""
    types = {name: family for family, form in FORMATS.items() for name in form.architectures}
    meant = {types[name] for name in map(str, named) if name in types} if isinstance(named, list) else set()
    if family is None:
        way_out = f"; of {shown(named)} it is {meant.pop()!r}: write that into the file" if len(meant) == 1 else ""
        raise BadInput(f"model_type is missing{way_out}")
    if meant and str(family) not in meant:
        raise BadInput(
            f"model_type {shown(family)} and architectures {shown(named)} contradict each other; correct the wrong one"
        )


def bias_of(raw: Mapping[str, object], form: Format) -> dict[str, str]:
    if not form.biases:
        return {}
    flags = [raw.get(key, False) for key in form.bias_keys]
    bias = form.biases.get(tuple(flag for flag in flags if isinstance(flag, bool)))
    if bias is None:
        told = ", ".join(f"{key}={shown(flag)}" for key, flag in zip(form.bias_keys, flags, strict=True))
        raise BadInput(f"{told} is not what our forward does: the MLP has biases only where attention has them")
    return {"bias": bias}


def refuse_short_windows(raw: Mapping[str, object], family: str, context: object) -> None:
    """A sliding window as long as the context never cuts anything off, and only then is left out."""
    defaults: dict[str, int | None] = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}
    layers, window = raw.get("layer_types"), raw.get("sliding_window", defaults.get(family))
    if isinstance(layers, list):
        if odd := [kind for kind in layers if kind not in ("full_attention", "sliding_attention")]:
            raise BadInput(f"layer_types has {shown(odd[0])}, which our forward does not do")
        slides = "sliding_attention" in layers
    elif family == "mistral":
        slides = True
    else:
        slides = bool(raw.get("use_sliding_window", False))
    if not slides or window is None or not isinstance(context, int):
        return
    if type(window) is not int or window < context:
        raise BadInput(
            f"sliding_window={shown(window)} cuts attention off within the context of {context}, which our forward "
            "does not do; with max_position_embeddings no longer than the window it is the same model"
        )


def config_in(path: Path) -> ModelConfig:
    """Of a config.json, or of a directory that holds one: no weights are needed."""
    file = path if path.name == "config.json" else path / "config.json"
    if not file.is_file():
        raise BadInput(f"model.path={path} holds no config.json; name a directory of save_pretrained")
    try:
        return from_transformers(read_json(file), file.parent)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


def unwrapped(name: str) -> str:
    """Without what torch.compile and DistributedDataParallel put before the names of what they wrap."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def read_transformers(directory: Path, tensors: Mapping[str, Stored] | None = None) -> Checkpoint:
    """A directory as `save_pretrained` leaves it, today's or an earlier one's; its `tensors` where they are elsewhere.

    Masks that old versions saved are passed over, whatever their dtype, and so are heads beside the language model's.
    """
    tensors = open_tensors(directory) if tensors is None else tensors
    config = config_in(directory)
    form = FORMATS[config.family]
    outer = form.names.outer["embedding"], form.names.outer["norm"], form.names.layer
    prefix = outer[0].partition(".")[0] + "."  # which a model saved without its head leaves out
    own = {name.removeprefix(prefix).partition(".")[0] for name in (*outer, form.names.outer.get("positions", ""))}
    named, others = {}, []
    for stored, tensor in tensors.items():
        name = unwrapped(stored)
        if name.endswith(BUFFERS):
            continue
        if name.startswith((prefix, "lm_head.")):
            named[name] = tensor
        elif name.partition(".")[0] in own:
            named[prefix + name] = tensor
        else:
            others.append(name)
    if others:
        told = shown(others[0]) + (f" and {len(others) - 1} more" if others[1:] else "")
        warnings.warn(f"{directory}: passed over {told}, which the language model does not use", stacklevel=2)
    head = named.pop("lm_head.weight", None) if config.tied else None
    embedding = named.get(form.names.outer["embedding"] + ".weight")
    if head and embedding and (head.shape != embedding.shape or not torch.equal(head.read(), embedding.read())):
        raise Integrity(f"{head.file}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
    return Checkpoint(where=directory, config=config, tensors=named)
