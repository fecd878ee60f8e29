"""Any causal LM of Transformers as it is, behind what our own GPT offers to the steps of both lives.

Nothing of its architecture is known here, so that nothing of it is done otherwise: the forward is Transformers' own,
its cache the one that `generate` grows. Code that a checkpoint brings along never runs, and pickles are never opened.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import read_json
from isoforward.base.vocabulary import Condition
from isoforward.formats.untrusted import shown

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

T = TypeVar("T")

CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNBOUNDED = 2048  # positions that are measured of a model that has no last one, as with ALiBi


class Wrapped(nn.Module):
    """Where a trunk ends and a head begins is each architecture's own affair: `trunk` is all of its forward, asked for
    the last position alone, as `generate` asks, and `head` has nothing left to do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        narrow = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.served: dict[str, object] = {"logits_to_keep": 1} if narrow else {}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype  # type: ignore[no-any-return]

    def compile_blocks(self) -> None:
        """All at once: where one ends is each architecture's own affair, too."""
        self.model.compile()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) to logits (B, T, V)"""
        return self.model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def trunk(self, tokens: Tensor, cache: WrappedCache | None = None) -> Tensor:
        """tokens (B, T) to logits (B, 1, V), or (B, T, V) where the architecture cannot leave them out."""
        past = None if cache is None else cache.held
        output = self.model(tokens, past_key_values=past, use_cache=cache is not None, **self.served)
        return output.logits  # type: ignore[no-any-return]

    def head(self, logits: Tensor) -> Tensor:
        return logits


class WrappedCache:
    """Of a batch of one. Rewound to a length, it holds as many positions: they are computed when that length is first
    asked for, which takes a prefill, and kept; since decoding joins new tensors and writes into none, they stay.
    """

    def __init__(self, model: Wrapped) -> None:
        self.model = model
        self.pasts: dict[int, DynamicCache] = {}
        self.rewind(0)

    @property
    def length(self) -> int:
        return self.held.get_seq_length()  # type: ignore[no-any-return]

    def rewind(self, length: int) -> None:
        if length not in self.pasts:
            self.pasts[length] = self.past(length)
        past = self.pasts[length]
        self.held = copy.copy(past)
        self.held.layers = [copy.copy(layer) for layer in past.layers]

    @torch.inference_mode()
    def past(self, length: int) -> DynamicCache:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.model.config)
        if length:
            tokens = torch.zeros(1, length, dtype=torch.long, device=self.model.model.device)
            self.model.model(tokens, past_key_values=cache, use_cache=True, **self.model.served)
        return cache


def quiet_transformers() -> ModuleType:
    """The library, without its progress bars and advice."""
    if find_spec("transformers") is None:
        raise BadInput("model=transformers needs Transformers: pip install isoforward[hf]")
    import transformers

    library: ModuleType = transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return library


def settings_of(directory: Path) -> PretrainedConfig:
    """Transformers' config of a directory; BadInput names a model_type that this Transformers does not know."""
    path = directory / "config.json"
    if not path.is_file():
        raise BadInput(f"model.path={directory} holds no config.json; name a directory of save_pretrained")
    kind = read_json(path).get("model_type")
    transformers = quiet_transformers()
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in known:
        raise BadInput(
            f"{path}: model_type {shown(kind)} is no causal LM of Transformers {transformers.__version__}, "
            "and code from a checkpoint is never run"
        )
    return opened(path, lambda: transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False))


def opened(path: Path, open_it: Callable[[], T]) -> T:
    from huggingface_hub.errors import StrictDataclassError  # of sizes that contradict

    refused = (OSError, ValueError, ImportError, RuntimeError, TypeError, KeyError, AttributeError)
    try:
        return open_it()
    except (*refused, StrictDataclassError) as error:
        first = " ".join(str(error.__cause__ or error).split())[:200]
        raise BadInput(f"{path}: Transformers cannot open it: {shown(first)}") from error


def skeleton(directory: Path, config: PretrainedConfig | None = None) -> Wrapped:
    """On the meta device: shapes without numbers. In bf16, which grouped products of experts insist on there.

    `config` stands for the directory's own.
    """
    auto, config = quiet_transformers().AutoModelForCausalLM, config or settings_of(directory)
    with torch.device("meta"):
        model = opened(directory, lambda: auto.from_config(config, dtype=torch.bfloat16, trust_remote_code=False))
    return Wrapped(model)


def load_wrapped(directory: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Wrapped:
    """For training: `dtype` is that of weights and activations alike, as Transformers' models know no other.

    Integrity names tensors that the directory lacks, which Transformers would draw at random.
    """
    settings_of(directory)
    auto = quiet_transformers().AutoModelForCausalLM
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    model, report = opened(directory, lambda: auto.from_pretrained(directory, output_loading_info=True, **options))
    if missing := sorted(report["missing_keys"]):
        raise Integrity(f"{directory}: the tensor {shown(missing[0])} is missing ({len(missing)} in all)")
    return Wrapped(model).to(device).train()


def frozen_copy(model: Wrapped) -> Wrapped:
    return copy.deepcopy(model).eval().requires_grad_(False)


def described(directory: Path) -> tuple[ModelConfig, dict[str, Condition]]:
    """What a case has to know to measure it, and what its rows say of it."""
    config = settings_of(directory).get_text_config()
    model = skeleton(directory).model
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise BadInput(f"{directory}: {name} keeps no keys and values, so that it has no prefill and decode as we know")
    context = next((getattr(config, key) for key in CONTEXTS if getattr(config, key, None)), UNBOUNDED)
    subject = ModelConfig(source="transformers", path=str(directory), context=context, vocab=config.vocab_size)
    labels: dict[str, Condition] = {
        "family": config.model_type,
        "layers": getattr(config, "num_hidden_layers", None),
        "width": getattr(config, "hidden_size", None),
        "heads": getattr(config, "num_attention_heads", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "architecture": name,
    }
    return subject, labels
