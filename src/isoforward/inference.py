"""Serving: a frozen model, the loop that turns forward passes into text, and nothing of training.

from isoforward.inference import load
print(load("runs/latest").generate("ROMEO:"))
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from isoforward import statefile
from isoforward.config import ModelConfig, one_of
from isoforward.errors import BadInput
from isoforward.model import GPT, KVCache
from isoforward.steps import decode, decode_uncached, prefill
from isoforward.tokenizer import Stream, Tokenizer
from isoforward.weights import freeze, load_export, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature first, then the `top_k` likeliest, then the fewest whose probabilities reach `top_p`."""

    temperature: float = 0.8  # 0: the likeliest token
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, V) to token ids (B,)"""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.masked_fill((before >= self.top_p).scatter(-1, order, before >= self.top_p), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass of the generation loop, for the rows (sequences) still under way."""

    rows: list[int]
    tokens: list[int]  # the one chosen, a row each
    context: int  # positions that the forward could see
    time_s: float
    logits: Tensor  # (B, V)


def forward_passes(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end: int | None = None,
    cache: bool = True,
) -> Iterator[Pass]:
    """The whole of inference: a forward over the prompts, then a forward a token until each row has ended.

    Rows of unlike lengths are padded at the left. A row ends with `end`, with `max_new_tokens`, or where the
    context is full; ended rows leave the batch. Prompts longer than the context raise BadInput.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if min(lengths) == 0:
        raise BadInput("the prompt is empty and the tokenizer has no end-of-text token to start from")
    if longest > model.config.context:
        raise BadInput(f"the prompt has {longest} tokens and the model's context holds {model.config.context}")
    device = model.embedding.weight.device
    padding = None
    if min(lengths) < longest:
        padding = torch.tensor([longest - length for length in lengths], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B, T)
    steps = min(max_new_tokens, model.config.context - longest + 1)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    past = None
    if cache or padding is not None:
        past = KVCache(
            model.config,
            batch=len(prompts),
            capacity=min(longest + steps, model.config.context),
            dtype=model.dtype,
            device=device,
            padding=padding,
        )
    rows = list(range(len(prompts)))
    for step in range(steps):
        start = time.perf_counter()
        if past is None:
            logits = decode_uncached(model, tokens)
        elif not cache:  # padded rows need the cache's mask and positions; emptied, it saves nothing
            past.length = 0
            logits = prefill(model, tokens, past)
        elif step == 0:
            logits = prefill(model, tokens, past)
        else:
            logits = decode(model, tokens[:, -1:], past)
        chosen = sampling.choose(logits, generator)
        ids = chosen.tolist()
        seen = tokens.shape[1]
        yield Pass(rows=rows, tokens=ids, context=seen, time_s=time.perf_counter() - start, logits=logits)
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        going = [i for i, token in enumerate(ids) if token != end]
        if not going:
            return
        if len(going) < len(rows):
            keep = torch.tensor(going, device=device)
            tokens, rows = tokens[keep], [rows[i] for i in going]
            if past is not None:
                past.keep(keep)


class InferenceModule(nn.Module):
    """A frozen GPT and its tokenizer. Its forward is the model's own, under `torch.inference_mode`."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)  # type: ignore[no-any-return]

    def encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt)
        if not ids and self.tokenizer.end is not None:
            return [self.tokenizer.end]  # an empty prompt starts a new document
        return ids

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        stop: str | None = None,
        cache: bool = True,
    ) -> Iterator[tuple[str, Pass]]:
        """Text as it becomes whole, with the forward pass that brought it; ends before `stop`."""
        ids = self.encode(prompt)
        pieces = Stream(self.tokenizer, ids)
        held = ""  # text that may be the beginning of `stop`
        last: Pass | None = None
        for step in forward_passes(
            self.model,
            [ids],
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            end=self.tokenizer.end,
            cache=cache,
        ):
            last = step
            held += "" if step.tokens[0] == self.tokenizer.end else pieces.push(step.tokens[0])
            if stop and stop in held:
                yield held.partition(stop)[0], step
                return
            ready = len(held) - overlap(held, stop)
            yield held[:ready], step
            held = held[ready:]
        if last is not None and (rest := held + pieces.flush()):
            yield rest, last

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | None = None,
        seed: int = 1234,
        cache: bool = True,
    ) -> str | list[str]:
        """The continuation of one prompt, or of several served as one batch."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        if isinstance(prompts, str):
            pieces = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, cache=cache)
            return "".join(text for text, _ in pieces)
        ids: list[list[int]] = [[] for _ in prompts]
        for step in forward_passes(
            self.model,
            [self.encode(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end=self.tokenizer.end,
            cache=cache,
        ):
            for row, token in zip(step.rows, step.tokens, strict=True):
                if token != self.tokenizer.end:
                    ids[row].append(token)
        texts = [self.tokenizer.decode(row) for row in ids]
        return [text.partition(stop)[0] for text in texts] if stop else texts


def overlap(text: str, stop: str | None) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    if not stop:
        return 0
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def find_export(checkpoint: str | Path) -> Path:
    """The export that `checkpoint` means: an export directory itself, or the one in a run directory."""
    path = Path(checkpoint)
    if not path.exists():
        hint = "; train one with: python train.py" if "latest" in path.parts else ""
        raise BadInput(f"checkpoint={checkpoint} does not exist{hint}")
    if path.is_dir():
        for directory in (path, path / "export"):
            if (directory / "config.json").is_file():
                return directory
        raise BadInput(f"checkpoint={checkpoint} holds no export (config.json, model.safetensors) and no export/")
    return path


def from_checkpoint(path: Path) -> GPT:
    """The model in training that a checkpoint file holds, with the dtype of its activations."""
    state = statefile.load(path, only=("state_dict", "isoforward"))
    about = state["isoforward"]
    model = GPT(ModelConfig(**about["model"]), dtype=DTYPES[about["precision"]])
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state["state_dict"].items()})
    return model


def load(checkpoint: str | Path, *, precision: str = "auto", device: str = "cpu") -> InferenceModule:
    """From an export directory, a run directory or a training checkpoint file.

    `precision` auto keeps the dtype of the export. Raises BadInput where nothing is there, Integrity where a file
    is not what its manifest says.
    """
    one_of("precision", precision, ("auto", *DTYPES))
    path = find_export(checkpoint)
    dtype = DTYPES.get(precision)
    if path.is_file():
        return InferenceModule(freeze(from_checkpoint(path), dtype=dtype).to(device), load_tokenizer(path.parent))
    model, tokenizer = load_export(path, dtype=dtype, device=device)
    return InferenceModule(model, tokenizer)
