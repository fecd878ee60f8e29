"""Any causal LM of Transformers as the subject of a plan: its config.json is enough, weights are never there.

One step and one generation run on the meta device, where tensors have shapes and no data. What they dispatch gives
FLOPs and the bytes alive at each moment. Peaks of smaller batches than the one asked for lie below the line through it
and one sequence, since a peak is the largest of amounts that are linear in the batch. Attention is taken to be one
fused kernel, with dropout or without, as it is on GPUs; a CPU with dropout there stores the scores, and holds more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD

from isoforward.base.errors import BadInput
from isoforward.base.vocabulary import Condition
from isoforward.measure.flops import FlopCounter, by_phase, fused_attention
from isoforward.measure.memory_ledger import generate, watch_training
from isoforward.measure.timeline import Timeline
from isoforward.model import steps
from isoforward.model.cost import UPDATES, Parts
from isoforward.model.footprint import size_of
from isoforward.plan.few_layers import Count, edges, extended, kinds_of, listed_kinds, on, repeats, shortened
from isoforward.plan.subject import Amount, NotCounted, Serving, Setup
from isoforward.serve.inference import DTYPES
from isoforward.serve.transformers_model import Wrapped, WrappedCache, described, settings_of, skeleton

OPTIMIZERS = {name: update.states for name, update in UPDATES.items() if name != "muon"}  # numbers a parameter
REFUSALS = (RuntimeError, NotImplementedError, ValueError, TypeError)  # of what asks the data what to do next


class Served(NamedTuple):
    """One sequence. `decode_bytes` are beside weights and cache: one layer's while it grows, logits, temporaries."""

    flops: dict[str, int]  # of a prompt and of a token after it
    prefill_bytes: int  # at the peak, less the weights
    decode_bytes: int
    kv_bytes: int  # of prompt and answer


class Counted:
    """Weights, gradients and optimizer state are of the precision, as Transformers trains them. `most` is the largest
    micro-batch that will be asked for.
    """

    def __init__(self, directory: Path, *, most: int = 2) -> None:
        self.directory, self.most = directory, most
        refuse_contradictions(directory)
        self.model, self.labels = described(directory)
        self.parameters = int(self.labels["parameters"] or 0)
        self.context = self.model.context

    @cached_property
    def skeleton(self) -> Wrapped:
        return skeleton(self.directory)

    @cached_property
    def shorter(self) -> tuple[Wrapped, Wrapped, int] | None:
        """Two models of few layers, and by how many periods more the whole differs; None where it has to be counted."""
        config = settings_of(self.directory)
        text = config.get_text_config()
        layers = getattr(text, "num_hidden_layers", None) or 0
        built = kinds_of(self.skeleton, layers)
        kinds = list(zip(built, listed_kinds(text, layers), strict=bool(built)))
        if (found := repeats(kinds)) is None:
            return None
        dropped, made = found.times - edges(found.period), []
        for fewer in (dropped, dropped - 1):
            stay = found.without(fewer, layers)
            made.append(skeleton(self.directory, shortened(config, stay)))
            if kinds_of(made[-1], len(stay)) != [built[n] for n in stay]:
                return None  # what a layer is follows from its number
        less, more = (sum(parameter.numel() for parameter in short.parameters()) for short in made)
        alike = on(less, more, dropped - 1) == self.parameters
        return (made[0], made[1], dropped - 1) if alike else None

    def count(self, of: Callable[[Wrapped], Count]) -> Count:
        if self.shorter is None:
            return of(self.skeleton)
        less, more, periods = self.shorter
        return extended(of(less), of(more), periods)

    @property
    def largest_unit(self) -> int:
        """Gathered: the embedding and the head, and two blocks, by their children's names."""
        tables = {id(p): p.numel() for p in self.tables()}
        blocks = (self.parameters - sum(tables.values())) // max(1, int(self.labels["layers"] or 1))
        return sum(tables.values()) + 2 * blocks

    def tables(self) -> list[Tensor]:
        inner = self.skeleton.model
        modules = (inner.get_input_embeddings(), inner.get_output_embeddings())
        return [p for module in modules if module is not None for p in module.parameters()]

    @property
    def conditions(self) -> dict[str, Condition]:
        return dict(self.labels) | {"vocab": self.model.vocab}

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        return {"checkpointing": ("none", "full"), "optimizer": tuple(OPTIMIZERS), "adapter": ("none",)}

    def state_dtype(self, setup: Setup) -> str:
        return setup.precision

    def training(self, setup: Setup, *, fused_norm: bool) -> dict[str, Parts]:
        if setup.optimizer not in OPTIMIZERS:
            raise BadInput(f"optimizer={setup.optimizer} has to know a block's matrices; write {listed(OPTIMIZERS)}")
        if setup.adapter.name != "none":
            raise BadInput(
                f"adapter={setup.adapter.name} has to know the maps of a block; write model=hf, or adapter=none"
            )
        how = (setup.length, setup.precision, setup.checkpointing)
        one, most = self.counted_step(1, *how)[0], self.counted_step(self.most, *how)[0]
        share = (setup.micro_batch - 1) / (self.most - 1) if self.most > 1 else 0.0
        held, whole = {}, size_of(setup.precision) * self.parameters
        for phase, parts in one.items():
            held[phase] = Parts({part: round(at + share * (most[phase][part] - at)) for part, at in parts.items()})
            held[phase]["optimizer"] = OPTIMIZERS[setup.optimizer] * whole
            if setup.accumulate > 1:
                held[phase]["gradients"] = whole
        if setup.accumulate > 1:  # gradients are there at the head too, where otherwise none is
            logits = size_of(setup.precision) * setup.micro_batch * setup.length * (self.model.vocab or 0)
            held["backward"]["activations"] = max(held["backward"]["activations"], held["loss"]["activations"] + logits)
        return held

    @cache  # noqa: B019 - it lives as long as the program
    def counted_step(self, batch: int, length: int, precision: str, checkpointing: str) -> tuple[dict[str, Parts], int]:
        """Peaks by phase of a micro-batch of `batch`, updated by an optimizer without a state, and its FLOPs."""
        if checkpointing not in self.choices["checkpointing"]:
            raise BadInput(f"checkpointing={checkpointing} is our own models'; Transformers' have none and full")
        counted = self.count(
            partial(training_count, batch=batch, length=length, precision=precision, how=checkpointing)
        )
        return counted.peaks(), sum(counted.flops.values())

    def step(self, setup: Setup) -> Amount:
        flops = self.counted_step(1, setup.length, setup.precision, setup.checkpointing)[1] * setup.batch
        e, kept = size_of(setup.precision), self.training(setup, fused_norm=True)["loss"]["activations"]
        passes = 3 * e * self.parameters + 2 * kept  # weights twice, their gradient; what is kept is written and read
        update = (3 + 2 * OPTIMIZERS[setup.optimizer]) * e * self.parameters
        return Amount(flops, (passes * setup.accumulate + update) * setup.devices)

    @cache  # noqa: B019
    def served(self, prompt: int, new: int, precision: str) -> Served:
        counted = self.count(partial(serving_count, prompt=prompt, precision=precision))
        peaks = {phase: held["gradients"] + held["activations"] for phase, held in counted.peaks().items()}
        return Served(
            flops=counted.flops,
            prefill_bytes=peaks["prefill"],
            decode_bytes=max(0, peaks["decode"] - counted.kept_bytes),
            kv_bytes=counted.kept_bytes * (prompt + new) // (prompt + 1),
        )

    def serving_bytes(self, serving: Serving) -> dict[str, int]:
        one, weights = self.of(serving), size_of(serving.precision) * self.parameters
        return {
            "prefill": weights + one.prefill_bytes + (serving.users - 1) * one.kv_bytes,
            "decode": weights + serving.users * (one.kv_bytes + one.decode_bytes),
        }

    def kv_bytes(self, serving: Serving) -> int:
        return serving.users * self.of(serving).kv_bytes

    def of(self, serving: Serving) -> Served:
        return self.served(serving.prompt, serving.new_tokens, serving.precision)

    def prefill(self, serving: Serving) -> Amount:
        return Amount(self.of(serving).flops["prefill"], size_of(serving.precision) * self.parameters)

    def decode(self, serving: Serving) -> Amount:
        """Weights that one token is multiplied by are read once for all users; experts, as far as users differ."""
        one = self.of(serving)
        multiplied = min(self.parameters, serving.users * one.flops["decode"] // 2)
        looked_back = serving.users * one.kv_bytes * serving.midway // (serving.prompt + serving.new_tokens)
        return Amount(serving.users * one.flops["decode"], size_of(serving.precision) * multiplied + looked_back)


def training_count(wrapped: Wrapped, *, batch: int, length: int, precision: str, how: str) -> Count:
    """Of one step; `how` it checkpoints."""
    wrapped.to(DTYPES[precision]).train()
    if how == "full":
        wrapped.model.activation_checkpointing_enable()
    updater = SGD(wrapped.parameters(), lr=0.1)
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    watch = Timeline(wrapped, tokens.device)
    counter = FlopCounter(watch.scope, convention="hardware")
    try:
        with fused_attention(), counter:
            watch_training(watch, wrapped, updater, tokens, tokens, step=partial(steps.train_step, clip=1.0))
    except REFUSALS as error:
        raise not_counted("training", error) from error
    finally:
        if how == "full":
            wrapped.model.activation_checkpointing_disable()
    return Count(watch.moments(), by_phase(counter.flops))


def serving_count(wrapped: Wrapped, *, prompt: int, precision: str) -> Count:
    """Of one prompt, and a token after it."""
    wrapped.to(DTYPES[precision]).eval()
    tokens = torch.zeros(1, prompt, dtype=torch.long, device="meta")
    watch = Timeline(wrapped, tokens.device)
    counter = FlopCounter(watch.scope)
    try:
        with fused_attention(), torch.inference_mode():
            room = WrappedCache(wrapped)
            watch.name("weights", (*wrapped.parameters(), *wrapped.buffers()))
            with counter, watch:
                generate(wrapped, tokens, room, new_tokens=2, phase=watch)
        pairs = [(layer.keys, layer.values) for layer in room.held.layers]
    except (*REFUSALS, AttributeError) as error:
        raise not_counted("serving", error) from error
    return Count(watch.moments(), by_phase(counter.flops), sum(each.nbytes for pair in pairs for each in pair))


def refuse_contradictions(directory: Path) -> None:
    """Of sizes that the meta device would pass: no product there fails for a number of heads."""
    config = settings_of(directory).get_text_config()
    heads, groups = (getattr(config, f"num_{of}_heads", None) for of in ("attention", "key_value"))
    if heads and groups and heads % groups:
        raise BadInput(f"{directory}: num_key_value_heads={groups} does not divide num_attention_heads={heads}")


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def not_counted(what: str, error: Exception) -> NotCounted:
    first = str(error).partition("\n")[0][:200]
    return NotCounted(f"{what} cannot be counted without data: {first}")
