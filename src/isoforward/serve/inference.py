"""Serving: a frozen model, its tokenizer, and nothing of training.

from isoforward import load
print(load("runs/latest").generate("ROMEO:"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from isoforward.base.checks import one_of
from isoforward.base.config import KERNELS, PRECISIONS, AdapterConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.data.chat import Message, chat_text
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats import checkpoint_file
from isoforward.formats.adapter_format import adapter_precision, add_adapter, find_adapter
from isoforward.formats.checkpoint_file import is_checkpoint
from isoforward.formats.export import allocate, freeze, unfilled
from isoforward.formats.loading import export_of, hub_hint, is_gguf, load_export, load_tokenizer
from isoforward.formats.untrusted import ORIGIN, checked, shown
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT
from isoforward.model.kernels import kernels_of, use_kernels
from isoforward.serve.continuation import Continuation
from isoforward.serve.decoding import Pass, Sampling, forward_passes
from isoforward.serve.exact import refuse_inexact, use_exact
from isoforward.serve.quantised import quantise, refuse_unquantisable
from isoforward.serve.speculative import speculative_passes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class InferenceModule(nn.Module):
    """A frozen GPT and its tokenizer. Its forward is the model's own, under `torch.inference_mode`.

    With a `draft`, a smaller model of the same tokenizer proposes `draft_tokens` at a time, which changes the speed and
    not what is drawn; `compile` decodes through a compiled step; `exact` decodes with the bits of training's forward.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        draft: InferenceModule | None = None,
        draft_tokens: int = 4,
        compile: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        rows = use_exact(model) if exact else 0
        self.passes: Callable[..., Iterator[Pass]] = partial(forward_passes, compile=compile, exact=rows)
        if draft is not None:
            if draft.tokenizer.sha256 != tokenizer.sha256:
                raise Integrity("draft: its tokenizer is another than the model's; take one trained with the same")
            self.passes = partial(speculative_passes, draft=draft.model, draft_tokens=draft_tokens, exact=rows)

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)  # type: ignore[no-any-return]

    def encode(self, prompt: str, *, template: bool = True, special: bool = False) -> list[int]:
        """The ids that Transformers' tokenizer gives, but for text that spells a special token: that takes `special`.

        Without `template`, nothing is added to the text. An empty one starts a new document.
        """
        ids = self.tokenizer.encode(prompt, template=template, special=special)
        if not ids and self.tokenizer.start is not None:
            return [self.tokenizer.start]
        return self.with_rows(ids)

    def encode_chat(self, messages: str | Sequence[Message]) -> list[int]:
        """`messages`, or one of the user, in the model's own chat template, up to where its answer begins."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.with_rows(self.tokenizer.encode(chat_text(self.tokenizer, messages), special=True))

    def with_rows(self, ids: list[int]) -> list[int]:
        if (largest := max(ids, default=0)) >= self.model.config.vocabulary:
            token = shown(self.tokenizer.backend.id_to_token(largest))
            raise BadInput(
                f"the prompt holds {token}, token {largest}, which was added to the tokenizer and not to the model: "
                f"its embedding has {self.model.config.vocabulary} rows"
            )
        return ids

    def _passes(self, prompts: Sequence[Sequence[int]], sampling: Sampling | None, **how: object) -> Iterator[Pass]:
        return self.passes(self.model, prompts, sampling=sampling or Sampling(), ends=self.tokenizer.ends, **how)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        stop: str | None = None,
        cache: bool = True,
    ) -> Iterator[tuple[str, Pass]]:
        """Text as it becomes whole, with the forward pass that brought it; ends before `stop`."""
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        row = Continuation(self.tokenizer, ids, stop=stop)
        last: Pass | None = None
        for last in self._passes([ids], sampling, max_new_tokens=max_new_tokens, cache=cache):
            yield "".join(row.add(token) for token in last.tokens), last
            if row.finished:
                break
        if last is not None and (rest := row.close()):
            yield rest, last

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        stop: str | None = None,
        cache: bool = True,
        logprobs: bool = False,
    ) -> list[Continuation]:
        """Several prompts, as ids, served as one batch; with `logprobs`, those of the model's own distribution."""
        rows = [Continuation(self.tokenizer, prompt, stop=stop) for prompt in prompts]
        for step in self._passes(prompts, sampling, max_new_tokens=max_new_tokens, cache=cache):
            chances = step.logits.double().log_softmax(-1) if logprobs else None
            for i, (at, token) in enumerate(zip(step.rows, step.tokens, strict=True)):
                rows[at].add(token, None if chances is None else float(chances[i, token]))
            if all(row.finished for row in rows):
                break
        for row in rows:
            row.close()
        return rows

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | None = None,
        seed: int = 1234,
        cache: bool = True,
    ) -> str | list[str]:
        """The continuation of one prompt, or of several served as one batch."""
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
        )
        ids = [self.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        rows = self.complete(ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, cache=cache)
        return rows[0].text if isinstance(prompts, str) else [row.text for row in rows]


def find_export(checkpoint: str | Path) -> Path:
    """What `checkpoint` means: the export in a run directory, or else what it names itself, a file or a directory."""
    path = Path(checkpoint)
    if not path.exists():
        hint = "; train one with: python train.py" if "latest" in path.parts else hub_hint(path)
        raise BadInput(f"checkpoint={checkpoint} does not exist{hint}")
    path = export_of(path)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(file.name for file in path.iterdir() if is_gguf(file))
        hint = f"; take its {files[0]}: checkpoint={path / files[0]}" if files else ""
        raise BadInput(f"checkpoint={checkpoint} holds no export (config.json, model.safetensors) and no export/{hint}")
    return path


def from_checkpoint(path: Path) -> GPT:
    """The model in training that a checkpoint file holds, with the dtype of its activations.

    Its shapes are compared before anything is allocated, so that a forged size costs nothing.
    """
    state = checkpoint_file.load(path, only=("state_dict", "isoforward"))
    try:
        about = state["isoforward"]
        config = checked({name: value for name, value in about["model"].items() if name not in ORIGIN})
        tensors = {name.removeprefix("model."): tensor for name, tensor in state["state_dict"].items()}
        if config.layers > len(tensors):
            raise ValueError(f"it claims {config.layers} layers and holds {len(tensors)} tensors")
        adapter = AdapterConfig(**about.get("adapter", {}))
        model = unfilled(config, DTYPES[about["precision"]])
        if adapter.name == "lora":  # what was trained beside frozen weights
            adapt(model, adapter)
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError("its tensors are not those of its model")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Integrity(f"{path} is whole, but holds no model that can be served: {shown(str(error))}") from error
    allocate(model, torch.float32, "cpu")
    model.load_state_dict(tensors)
    return model


def load(
    checkpoint: str | Path,
    *,
    precision: str = "auto",
    device: str = "cpu",
    draft: str | Path | None = None,
    draft_tokens: int = 4,
    compile: bool = False,
    kernels: str = "auto",
    batch: int = 1,
    lora: str | Path | None = None,
    exact: bool = False,
) -> InferenceModule:
    """From a run, an export, a training checkpoint, a Transformers directory, a safetensors or a GGUF file.

    `precision` auto keeps the dtype of the export; int8 changes the forward. `draft` is another such place. Raises
    BadInput where nothing is there, Integrity where a file is not what its manifest says, or the draft's tokenizer
    another. `lora` is an adapter's directory: it is served beside the weights, which must be those it was trained on,
    and in its precision where none is asked for. `kernels` auto decodes `batch` prompts at once by the kernels that are
    the fastest here, reference by PyTorch's plain ones. `exact` decodes with training's bits, at a price.
    """
    one_of("precision", precision, PRECISIONS)
    one_of("kernels", kernels, KERNELS)
    path = find_export(checkpoint)
    if exact:
        refuse_inexact(
            {
                "precision=int8": precision == "int8",
                "compile=true": compile,
                "lora=": lora is not None,
                f"device={device}": device != "cpu",
            }
        )
    lora = None if lora is None else find_adapter(lora)
    if lora is not None and precision == "int8":
        raise BadInput("lora= is served in the precision it was trained in; leave out precision=int8")
    if lora is not None and precision == "auto":
        precision = adapter_precision(lora)
    if precision == "int8":
        refuse_unquantisable(torch.device(device))
    dtype = torch.float32 if precision == "int8" else DTYPES.get(precision)
    if is_checkpoint(path) or path.suffix == ".ckpt":  # by its name where its beginning is damaged
        model, tokenizer = freeze(from_checkpoint(path), dtype=dtype).to(device), load_tokenizer(path.parent)
    else:
        model, tokenizer = load_export(path, dtype=dtype, device=device)
    if lora is not None:
        add_adapter(model, lora)
    if precision == "int8":
        quantise(model)
    elif kernels == "auto" and not (compile or exact):
        use_kernels(model, kernels_of(model.config, model.dtype, torch.device(device), (1, batch)))
    smaller = None if draft is None else load(draft, precision=precision, device=device, kernels=kernels)
    return InferenceModule(model, tokenizer, draft=smaller, draft_tokens=draft_tokens, compile=compile, exact=exact)
