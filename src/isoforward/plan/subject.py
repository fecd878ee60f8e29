"""What a plan asks of a model: the few answers that memory and time follow from. Our families give them by formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple, Protocol

from isoforward.base.checks import at_least, one_of, sized
from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.vocabulary import Condition
from isoforward.model import adapter_cost, cost, footprint
from isoforward.model.cost import Lengths, Parts

STRATEGIES = {"ddp": 0, "fsdp": 3}  # as stages of ZeRO: nothing of the state is cut up, or all of it


class NotCounted(BadInput):
    """Of an architecture that asks its data what to do next: no key would mend that."""


class Amount(NamedTuple):
    """Of one execution."""

    flops: float
    moved_bytes: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained. `batch` is of one optimizer step, over all devices."""

    batch: int = 8
    length: int = 1024
    precision: str = "bf16"
    optimizer: str = "adamw"
    accumulate: int = 1
    checkpointing: str = "none"
    devices: int = 1
    strategy: str = "ddp"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulate", "devices"):
            sized(name, getattr(self, name))
        one_of("precision", self.precision, ("fp32", "bf16"))
        one_of("optimizer", self.optimizer, tuple(cost.UPDATES))
        one_of("checkpointing", self.checkpointing, cost.CHECKPOINTING)
        one_of("strategy", self.strategy, tuple(STRATEGIES))
        if self.adapter.name != "none" and self.strategy == "fsdp":
            raise BadInput(f"adapter={self.adapter.name} trains whole matrices; write strategy=ddp")
        pieces = self.accumulate * self.devices
        if self.batch % pieces:
            raise BadInput(
                f"batch={self.batch} cannot be cut into accumulate x devices = {pieces} equal parts; "
                f"write batch={pieces * max(1, round(self.batch / pieces))}"
            )

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward on one device."""
        return self.batch // (self.accumulate * self.devices)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def conditions(self) -> dict[str, Condition]:
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return own | {"adapter": self.adapter.told}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """`users` are answered at once: each has a prompt and an answer of these lengths in the cache."""

    users: int = 32
    prompt: int = 1000
    new_tokens: int = 250
    precision: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("users", "prompt", "new_tokens"):
            at_least(name, getattr(self, name), 1)

    @property
    def midway(self) -> int:
        """Tokens that a decode step looks back at, on average."""
        return self.prompt + self.new_tokens // 2


class Subject(Protocol):
    """All counts are of one device that holds the whole model."""

    @property
    def parameters(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def largest_unit(self) -> int:
        """Parameters that a device gathers beside its own share, where weights are cut up."""
        ...

    @property
    def conditions(self) -> Mapping[str, Condition]: ...
    @property
    def choices(self) -> Mapping[str, tuple[str, ...]]:
        """Values of `checkpointing`, `optimizer` and `adapter` that it can be trained with."""
        ...

    def state_dtype(self, setup: Setup) -> str:
        """Of trained weights, their gradients and the optimizer's state; activations are of `setup.precision`."""
        ...

    def training(self, setup: Setup, *, fused_norm: bool) -> dict[str, Parts]:
        """Peak bytes of each phase: weights, gradients, optimizer, activations (with logits and temporaries)."""
        ...

    def step(self, setup: Setup) -> Amount:
        """An optimizer step of the whole batch, what is recomputed included."""
        ...

    def serving_bytes(self, serving: Serving) -> dict[str, int]:
        """Peaks of prefill, of one prompt at a time beside everyone's cache, and of decode."""
        ...

    def kv_bytes(self, serving: Serving) -> int: ...
    def prefill(self, serving: Serving) -> Amount:
        """Of one prompt."""
        ...

    def decode(self, serving: Serving) -> Amount:
        """Of one token for each user."""
        ...


@dataclass(frozen=True)
class Known:
    """One of our families, by cost.py and footprint.py."""

    model: ModelConfig

    @cached_property
    def parameters(self) -> int:
        return cost.parameters(self.model).total

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def largest_unit(self) -> int:
        tables = self.model.vocabulary * self.model.width * (1 if self.model.tied else 2)
        return tables + 2 * cost.layer_parameters(self.model)  # the next block is fetched while one computes

    @property
    def conditions(self) -> dict[str, Condition]:
        shape = {key: getattr(self.model, key) for key in ("family", "layers", "width", "heads", "vocab")}
        return shape | {"parameters": self.parameters}

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        return {"checkpointing": cost.CHECKPOINTING, "optimizer": tuple(cost.UPDATES), "adapter": ("none", "lora")}

    def state_dtype(self, setup: Setup) -> str:
        return "fp32"

    def training(self, setup: Setup, *, fused_norm: bool) -> dict[str, Parts]:
        peaks = footprint.training_peaks(
            self.model,
            batch=setup.micro_batch,
            length=setup.length,
            dtype=setup.precision,
            optimizer=setup.optimizer,
            accumulate=setup.accumulate,
            checkpointing=setup.checkpointing,
            fused_norm=fused_norm,
        )
        state = footprint.training_state(self.model, optimizer=setup.optimizer)
        adapted = adapter_cost.adapted_training_state(self.model, setup.adapter, optimizer=setup.optimizer)
        logits = footprint.size_of(setup.precision) * setup.micro_batch * setup.length * self.model.vocabulary
        at_the_head = peaks["loss"] + logits  # in the backward, where no gradient of a weight is there yet
        held = {}
        for phase, peak in peaks.items():
            late = phase == "optimizer" or (phase == "backward" and peak > at_the_head * 1.05)
            gradients = state["gradients"] if setup.accumulate > 1 or late else 0
            rest = max(0, peak - state["weights"] - state["optimizer"] - gradients)
            # activations are kept wherever a gradient passes, whatever is trained; of adapters the state is small
            kept = adapted if setup.adapter.name != "none" else state
            held[phase] = Parts(kept | {"gradients": kept["gradients"] if gradients else 0, "activations": rest})
        return held

    def step(self, setup: Setup) -> Amount:
        size = Lengths(batch=setup.batch, length=setup.length)
        forward = cost.forward_flops(self.model, **size)
        backward = cost.backward_flops(self.model, **size, convention="hardware", checkpointing=setup.checkpointing)
        update = cost.optimizer_flops(self.model, optimizer=setup.optimizer)["products"]
        if setup.adapter.name != "none":
            update = 0
            forward = adapter_cost.adapted_forward_flops(self.model, setup.adapter, **size)
            backward = adapter_cost.adapted_backward_flops(self.model, setup.adapter, **size, convention="hardware")
            backward += cost.recomputed_flops(self.model, **size, checkpointing=setup.checkpointing)
        moved = footprint.training_bytes(
            self.model,
            batch=setup.micro_batch,
            length=setup.length,
            dtype=setup.precision,
            optimizer=setup.optimizer,
            checkpointing=setup.checkpointing,
        )
        passes = (moved.total - moved["optimizer"]) * setup.accumulate + moved["optimizer"]
        return Amount((forward + backward).total + update * setup.devices, passes * setup.devices)

    def serving_bytes(self, serving: Serving) -> dict[str, int]:
        def peak(phase: str, batch: int) -> int:
            peaks = footprint.inference_peaks(
                self.model, batch=batch, prompt=serving.prompt, new=serving.new_tokens, dtype=serving.precision
            )
            return peaks[phase]

        others = self.kv_bytes(serving) * (serving.users - 1) // serving.users
        return {"prefill": peak("prefill", 1) + others, "decode": peak("decode", serving.users)}

    def kv_bytes(self, serving: Serving) -> int:
        length = serving.prompt + serving.new_tokens
        return footprint.kv_bytes(self.model, batch=serving.users, length=length, dtype=serving.precision)

    def prefill(self, serving: Serving) -> Amount:
        flops = cost.forward_flops(self.model, batch=1, length=serving.prompt, logits="last")
        moved = footprint.inference_bytes(self.model, batch=1, length=serving.prompt, dtype=serving.precision)
        return Amount(flops.total, moved.total)

    def decode(self, serving: Serving) -> Amount:
        users, cached = serving.users, serving.midway
        flops = cost.decode_flops(self.model, batch=users, cached=cached)
        moved = footprint.inference_bytes(self.model, batch=users, cached=cached, dtype=serving.precision)
        return Amount(flops.total, moved.total)
