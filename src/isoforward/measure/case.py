"""What is measured: one typed, frozen description, carried as it is into every process, and what is built from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from isoforward.base.config import AdapterConfig, MeasureConfig, ModelConfig, OptimConfig
from isoforward.base.device import device_of
from isoforward.base.results import Row, RowFields, row_of
from isoforward.base.stopwatch import Clock
from isoforward.base.vocabulary import Condition
from isoforward.formats.export import freeze, merged
from isoforward.formats.loading import load_trainable
from isoforward.measure.benchmark import Part
from isoforward.model import cost
from isoforward.model.adapters import adapt
from isoforward.model.gpt import GPT
from isoforward.model.kernels import Kernels, backward_of, kernels_of, named, use_backward, use_kernels
from isoforward.serve.inference import DTYPES


@dataclass(frozen=True, kw_only=True)
class Case:
    """`export` gives the weights; without it they are drawn from `seed`. Its labels are pure functions of it."""

    experiment: str
    model: ModelConfig
    export: str | None = None
    batch: int = 8
    length: int = 256
    accumulate: int = 1
    checkpointing: str = "none"
    compile: bool = False
    precision: str = "fp32"
    device: str = "cpu"
    hardware: str = "here"  # whose peaks a rate is held against
    attention_backward: str = "fused"  # or plain: chosen where the case is made, for the device it runs on
    kernels: Kernels = field(default_factory=dict)  # of products of few rows: chosen there too
    threads: int | None = None
    seed: int = 1234
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    labels: Mapping[str, Condition] = field(default_factory=dict)  # more conditions, of the question asked

    @property
    def prompt(self) -> int:
        return min(self.measure.prompt, self.model.context - 2)

    @property
    def new_tokens(self) -> int:
        return min(self.measure.new_tokens, self.model.context - self.prompt)

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward and backward."""
        return self.batch // self.accumulate

    @property
    def rule(self) -> str:
        """The optimizer by the name that cost.py knows it by."""
        return "momentum" if self.optim.name == "sgd" and self.optim.momentum else self.optim.name

    @property
    def clock(self) -> Clock:
        return device_of(self.device)

    @property
    def contexts(self) -> list[int]:
        """Where the cache curve is read: up to the model's context, or what is measured of it, by doublings."""
        found = [min(self.model.context, self.measure.context)]
        while found[-1] >= 32 and len(found) < 6:
            found.append(found[-1] // 2)
        return found[::-1]

    def conditions(self, **more: Condition) -> dict[str, Condition]:
        own: dict[str, Condition] = {
            "family": self.model.family,
            "layers": self.model.layers,
            "width": self.model.width,
            "heads": self.model.heads,
            "vocab": self.model.vocab,
            "parameters": cost.parameters(self.model).total,
            "dtype": self.precision,
        }
        if self.checkpointing != "none":
            own["checkpointing"] = self.checkpointing
        if self.compile:
            own["compile"] = True
        if self.adapter.name != "none":
            own["adapter"] = self.adapter.told
        return own | dict(self.labels) | more

    def training(self, **more: Condition) -> dict[str, Condition]:
        own: dict[str, Condition] = {"batch": self.batch, "length": self.length, "tokens": self.batch * self.length}
        if self.attention_backward != "fused":
            own["attention_backward"] = self.attention_backward
        return self.conditions(**own, optimizer=self.optim.name, **more)

    def prefilling(self, **more: Condition) -> dict[str, Condition]:
        """Serving applies the head to the last position alone; the forward of training's batch, to all."""
        return self.conditions(batch=1, prompt=self.prompt, tokens=self.prompt, head="last position", **more)

    def decoding(self, **more: Condition) -> dict[str, Condition]:
        own: dict[str, Condition] = {"prompt": self.prompt, "new_tokens": self.new_tokens, "tokens": 1, "cache": True}
        return self.conditions(batch=1, **own, **self.decode_kernels(1), **more)

    def at_context(self, context: int, *, cache: bool, **more: Condition) -> dict[str, Condition]:
        own = self.decode_kernels(1) if cache else {}
        return self.conditions(batch=1, tokens=1, context=context, cache=cache, **own, **more)

    def decode_kernels(self, rows: int) -> dict[str, Condition]:
        """Named where a decode of so many sequences computes its products by others than F.linear."""
        used = None if self.compile else named(self.kernels, rows)  # a compiler writes the products itself
        return {"kernels": used} if used else {}

    def row(self, *shared: RowFields, **fields: Unpack[RowFields]) -> Row:
        return row_of(self.experiment, *shared, **fields)

    def step(self, phase: str, **more: Condition) -> Part:
        """A phase of training, or its whole `step`."""
        return Part(life="training", phase=phase, per="step", conditions=self.training(**more))

    def serve(self, phase: str) -> Part:
        """The forward of training's batch, prefill, or decode."""
        forward, prefill, decode = ("step", self.training), ("sequence", self.prefilling), ("token", self.decoding)
        per, conditions = {"forward": forward, "prefill": prefill, "decode": decode}[phase]
        return Part(life="inference", phase=phase, per=per, conditions=conditions())

    def after(self, context: int, *, cache: bool) -> Part:
        """One more token at that context."""
        return Part(life="inference", phase="decode", per="token", conditions=self.at_context(context, cache=cache))


def counted(flops: float, convention: str = "model") -> RowFields:
    return {"quantity": "flops", "value": float(flops), "provenance": "counted", "convention": convention}


def with_kernels(case: Case, *, rows: Sequence[int] = (1,)) -> Case:
    """The kernels that are the faster ones for it on this machine, measured where that is not known yet.

    `rows` are the sequences that it decodes at once.
    """
    about = (case.model, DTYPES[case.precision], torch.device(case.device))
    return replace(
        case,
        attention_backward=backward_of(*about, batch=case.micro_batch, length=case.length),
        kernels=kernels_of(*about, rows),
    )


def master_of(case: Case) -> GPT:
    """With fp32 weights, as training holds them."""
    dtype = DTYPES[case.precision]
    if case.export is not None:
        model = load_trainable(Path(case.export), dtype=dtype, checkpointing=case.checkpointing)
    else:
        torch.manual_seed(case.seed)
        model = GPT(case.model, dtype=dtype, checkpointing=case.checkpointing)
    adapt(model, case.adapter)
    use_backward(model, case.attention_backward)
    return model.to(case.device).train()


def frozen_of(case: Case, master: GPT) -> GPT:
    """As serving holds it, an adapter merged, with the kernels of the case."""
    frozen = freeze(merged(master))
    use_kernels(frozen, case.kernels)
    return frozen


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Random tokens: what a phase costs does not depend on what the text says."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.length + 1)
    tokens = torch.randint(case.model.vocabulary, shape, generator=generator).to(case.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def differing_logits(master: nn.Module, frozen: nn.Module, tokens: Tensor) -> int:
    """How many of the frozen forward's logits are not, bit for bit, those of training's forward."""
    trained = master.eval()(tokens).detach()
    master.train()
    with torch.inference_mode():
        served = frozen(tokens)
    return int((trained != served).sum())


def identity_row(case: Case, master: nn.Module, frozen: nn.Module, tokens: Tensor) -> Row:
    """Every comparison of both lives begins with it, on its own weights."""
    conditions = case.conditions(logits=tokens.numel() * case.model.vocabulary)
    value = float(differing_logits(master, frozen, tokens))
    about: RowFields = {"life": "inference", "phase": "forward", "quantity": "identity", "per": "run"}
    return case.row(about, value=value, conditions=conditions)
