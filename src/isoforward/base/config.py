"""What a run is: frozen, typed, validated where it is built, with no import beyond the standard library."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from isoforward.base.architecture import CHOICES, FAMILIES, Architecture, checked_rope_scaling
from isoforward.base.errors import BadInput

VALIDATION_ROWS = 8  # sequences that trainer.validation_batches counts as one
LARGEST = 2**21  # no real model has more positions, tokens, layers or features, and no batch more sequences


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"{key}={value} is not known: {hint}choose one of {', '.join(allowed)}")


def at_least(key: str, value: float | None, least: float) -> None:
    """None means "not set" and passes; NaN never does, nor what no float or 64 bits hold."""
    if value is not None and not least <= value < 2**53:
        more = " and below 2^53" if value >= least else ""
        raise BadInput(f"{key}={value} must be a finite number of at least {least:g}{more}")


def sized(key: str, value: int | None) -> None:
    at_least(key, value, 1)
    if value is not None and value > LARGEST:
        raise BadInput(f"{key}={value} is more than any has; it can be {LARGEST} at most")


def within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"{key}={value} must lie between {low:g} and {high:g}")


UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def duration_s(key: str, text: str) -> int:
    """2h, 90m, 1h30m, 45s, HH:MM:SS, and days before it as DD:HH:MM:SS or, as Slurm has it, D-HH:MM:SS."""
    if re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text):
        seconds = sum(int(number) * UNITS_S[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
    elif clock := re.fullmatch(r"(?:(\d+)[:-])?(\d+):(\d+):(\d+)", text):
        seconds = sum(int(number or 0) * unit for number, unit in zip(clock.groups(), UNITS_S.values(), strict=True))
    else:
        seconds = 0
    if not 0 < seconds < 2**31:
        raise BadInput(f"{key}={text} is no duration; write 2h, 90m, 1h30m, HH:MM:SS or DD:HH:MM:SS")
    return seconds


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only model. `family` presets what architecture.py lists; each of that can be set on its own.

    `source` says where weights come from: `fresh` (drawn from the seed), `hf` (a checkpoint at `path` of one of the
    families, read into our forward) or `transformers` (any causal LM at `path`, wrapped as it is).
    """

    family: str = "gpt2"
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: one per head
    width: int = 128
    head_dim: int | None = None  # None: width / heads
    ffn: int | None = None  # None: 4 x width (gelu), 8/3 x width rounded up to 64 (swiglu, geglu)
    context: int = 256
    vocab: int | None = None  # None: the tokenizer's
    tied: bool = True
    norm: str | None = None  # None, here and in the next six: the family's
    norm_position: str | None = None
    mlp: str | None = None
    positions: str | None = None
    qk_norm: str | None = None
    bias: bool | str | None = None  # none, qkv, attention or all; true and false are all and none
    scaled_embedding: bool | None = None
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # A dict: type (linear, dynamic, yarn, llama3) and its settings, or Transformers' rope_type. Any, since OmegaConf
    # merges no dict into an optional one
    rope_scaling: Any = None
    source: str = "fresh"
    path: str | None = None

    def __post_init__(self) -> None:
        one_of("model.family", self.family, tuple(FAMILIES))
        one_of("model.source", self.source, ("fresh", "hf", "transformers"))
        if isinstance(self.bias, bool):
            object.__setattr__(self, "bias", "all" if self.bias else "none")
        for name, allowed in CHOICES.items():
            if (chosen := getattr(self, name)) is not None:
                one_of(f"model.{name}", chosen, allowed)
        for name in ("layers", "heads", "kv_heads", "width", "head_dim", "ffn", "context", "vocab"):
            sized(f"model.{name}", getattr(self, name))
        if self.head_dim is None and self.width % self.heads:
            fits = [n for n in range(1, min(self.width, 128) + 1) if self.width % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - self.heads))[:4])
            raise BadInput(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                f"near it these do: {', '.join(map(str, near))}"
            )
        if self.heads % self.kv_head_count:
            raise BadInput(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")
        sized("model.heads x model.head_dim", self.heads * self.head_width)
        if self.architecture.rope and self.head_width % 2:
            odd = "model.width/model.heads" if self.head_dim is None else "model.head_dim"
            raise BadInput(
                f"{odd}={self.head_width} is odd: rotary positions turn pairs of features; choose an even head width"
            )
        within("model.dropout", self.dropout, 0.0, 0.99)
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise BadInput(f"model.norm_eps={self.norm_eps} must be a positive number")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise BadInput(f"model.rope_theta={self.rope_theta} must be a positive number")
        object.__setattr__(self, "rope_scaling", checked_rope_scaling(self.rope_scaling))
        if self.source != "fresh" and not self.path:
            raise BadInput(f"model={self.source} needs model.path=DIRECTORY")

    @cached_property
    def architecture(self) -> Architecture:
        """The family's, with what is set here in its place."""
        own = {key.name: getattr(self, key.name) for key in fields(Architecture)}
        return replace(FAMILIES[self.family], **{key: value for key, value in own.items() if value is not None})

    @property
    def kv_head_count(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def attention_width(self) -> int:
        """Of the queries of all heads, side by side."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_head_count * self.head_width

    @property
    def qkv_widths(self) -> list[int]:
        return [self.attention_width, self.kv_width, self.kv_width]

    @property
    def fused_rows(self) -> dict[str, list[int]]:
        """Of the maps that one matrix holds, by the last part of its module's name."""
        return {"qkv": self.qkv_widths, "gate_up": [self.ffn_width] * 2}

    @property
    def ffn_width(self) -> int:
        if self.ffn is not None:
            return self.ffn
        return 64 * math.ceil(8 * self.width / 3 / 64) if self.architecture.gated else 4 * self.width

    @property
    def vocabulary(self) -> int:
        if self.vocab is None:
            raise BadInput("model.vocab is not set and no tokenizer was there to give it; write model.vocab=N")
        return self.vocab


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, how it becomes tokens, and the shape of one optimizer step's batch."""

    source: str = "shakespeare"
    path: str | None = None  # source=text: a file, directory or glob
    name: str | None = None  # source=hub: a dataset's name
    column: str = "text"  # the column that holds the text; a dot leads into nested ones
    tokenizer: str = "bpe"  # char, bpe, gpt2 or the path of a tokenizer.json
    vocab: int = 1024  # tokenizer=bpe: how many tokens to learn
    validation: float = 0.1  # share of documents held out; shakespeare declares its plays instead
    batch: int = 8  # sequences of one optimizer step, over all devices
    length: int = 256  # tokens of one sequence
    workers: int = 0
    cache_dir: str | None = None  # None: $XDG_CACHE_HOME/isoforward or ~/.cache/isoforward

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("shakespeare", "text", "hub", "synthetic"))
        for name in ("batch", "length", "vocab"):
            sized(f"data.{name}", getattr(self, name))
        at_least("data.vocab", self.vocab, 257)
        within("data.workers", self.workers, 0, 1024)
        within("data.validation", self.validation, 0.0, 0.9)
        if self.source == "text" and not self.path:
            raise BadInput("data=text needs data.path=FILE, DIRECTORY or GLOB")
        if self.source == "hub" and not self.name:
            raise BadInput("data=hub needs data.name=DATASET")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"
    lr: float = 3e-3
    min_lr: float = 0.1  # as a share of lr, reached at the last step
    schedule: str = "cosine"  # or linear, constant
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # sgd, muon
    muon_lr: float = 0.02  # matrices under name=muon; everything else takes lr
    clip: float | None = 1.0  # None: the gradient's norm is measured but not cut

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, ("adamw", "adam", "sgd", "muon"))
        one_of("optim.schedule", self.schedule, ("cosine", "linear", "constant"))
        for name in ("lr", "muon_lr", "weight_decay", "warmup_steps"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        within("optim.min_lr", self.min_lr, 0.0, 1.0)
        for name in ("beta1", "beta2", "momentum"):
            within(f"optim.{name}", getattr(self, name), 0.0, 0.9999999)
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"optim.clip={self.clip} must be positive, or null for none")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What of a model is trained: all of it, named parts alone (frozen), or low-rank maps beside frozen ones (lora)."""

    name: str = "none"
    targets: list[str] = field(default_factory=list)  # lora: q, k, v, out, ...; frozen: head, blocks.3, ...
    rank: int = 8
    alpha: float = 16.0  # what a low-rank map gives is multiplied by alpha / rank
    base: str = "full"  # lora: the blocks' frozen matrices as they are, or in int8

    def __post_init__(self) -> None:
        one_of("adapter.name", self.name, ("none", "lora", "frozen"))
        one_of("adapter.base", self.base, ("full", "int8"))
        if self.base == "int8" and self.name != "lora":
            raise BadInput(f"adapter.base=int8 holds what stays frozen beside adapter=lora, not {self.name}")
        sized("adapter.rank", self.rank)
        if not 0 < self.alpha < 2**53:
            raise BadInput(f"adapter.alpha={self.alpha} must be a positive number")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def told(self) -> str:
        """In a word, as rows name it."""
        named = ", ".join(self.targets)
        if self.name == "lora":
            on = f" on {named}" if named else ""
            return f"LoRA, r={self.rank}{on}" + (" over int8" if self.base == "int8" else "")
        return {"none": "full", "frozen": f"{named or 'head'} alone"}[self.name]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    max_steps: int = 700
    max_time: str | None = None  # of this start: 2h, 90m, 1h30m, HH:MM:SS or DD:HH:MM:SS
    accelerator: str = "auto"
    devices: int = 1  # of each machine
    nodes: int = 1  # machines; more than one are started by torchrun
    strategy: str = "auto"
    accumulate: int = 1  # micro-batches that one optimizer step is cut into
    checkpointing: str = "none"  # activations: kept, or recomputed in backward
    validate_every: int = 100
    validation_batches: int = 8  # of 8 sequences each, whatever data.batch is: the text that is judged stays the same
    checkpoint_every: int = 100
    resume: str | None = None  # a checkpoint or run directory, or auto
    early_stopping: int | None = None  # validations without improvement
    profiler: str | None = None  # pytorch: three steps in trace.json, which a browser opens
    progress: bool = True

    def __post_init__(self) -> None:
        one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        one_of("trainer.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        one_of("trainer.checkpointing", self.checkpointing, ("none", "selective", "full"))
        for name in (
            "max_steps",
            "devices",
            "nodes",
            "accumulate",
            "validate_every",
            "validation_batches",
            "checkpoint_every",
        ):
            at_least(f"trainer.{name}", getattr(self, name), 1)
        at_least("trainer.early_stopping", self.early_stopping, 1)
        if (judged := self.validation_batches * VALIDATION_ROWS) < (world := self.devices * self.nodes):
            raise BadInput(
                f"trainer.validation_batches={self.validation_batches} validates on {judged} sequences, and each of "
                f"{world} devices needs one; write trainer.validation_batches={math.ceil(world / VALIDATION_ROWS)}"
            )
        if self.profiler is not None:
            one_of("trainer.profiler", self.profiler, ("pytorch",))
        if self.max_time is not None:
            duration_s("trainer.max_time", self.max_time)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How precisely is measured, and for how long at most.

    Measuring ends when every time is known to `precision` and every comparison is decided, or when `budget` is spent.
    """

    enabled: bool = True
    precision: float = 0.05  # half-width of a time's interval, relative to what the time is a part of
    budget: float = 40.0  # seconds, for all that one process times
    margin: float = 0.03  # relative difference below which two times count as equal
    repeats: int | None = None  # a fixed number of samples instead of precision and budget
    processes: int = 1  # fresh ones; from 3 on, what varies between processes is in the interval
    warmup: int = 3
    prompt: int = 64  # tokens of the prefill; the decode starts there
    new_tokens: int = 64  # decode steps of one measured generation
    context: int = 1024  # the longest past that the cache curve looks at
    energy: str = "auto"  # auto: measured or unavailable; or a wattage to estimate with, such as 65W

    def __post_init__(self) -> None:
        for name in ("precision", "margin"):
            within(f"measure.{name}", getattr(self, name), 1e-4, 1.0)
        within("measure.budget", self.budget, 0.01, 86400)
        at_least("measure.repeats", self.repeats, 5)
        within("measure.processes", self.processes, 1, 64)
        if self.processes == 2:
            raise BadInput("measure.processes=2 does not show how much processes vary; write 1, or at least 3")
        at_least("measure.warmup", self.warmup, 1)
        at_least("measure.prompt", self.prompt, 1)
        at_least("measure.new_tokens", self.new_tokens, 2)
        at_least("measure.context", self.context, 2)
        if self.energy != "auto":
            try:
                watts = float(self.energy.removesuffix("W"))
            except ValueError:
                watts = -1.0
            if not watts > 0:
                raise BadInput(f"measure.energy={self.energy} must be auto or a wattage such as 65W")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    mode: str = "auto"  # auto: as $WANDB_MODE says; where it says nothing, online where a key is set, else offline
    project: str | None = None  # None: $WANDB_PROJECT or isoforward
    entity: str | None = None  # None: $WANDB_ENTITY, or the key's own
    group: str | None = None  # None: $WANDB_RUN_GROUP, or the run directory, which ties both lives of one model
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("auto", "wandb", "none"))


PRECISIONS = ("auto", "fp32", "bf16", "int8")  # int8 serves alone: nothing is trained in it
KERNELS = ("auto", "reference")  # the fastest here, or PyTorch's plain ones, the same on every run
KERNELS_VARIABLE = "ISOFORWARD_KERNELS"  # of the environment: for a process and those that it starts


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every command shares."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hardware: str = "here"  # here, a name of the built-in table, or a file made by calibrate
    precision: str = "auto"
    kernels: str = "auto"  # the fastest here, measured once; or reference, plain PyTorch everywhere
    compile: bool = False
    seed: int = 1234
    run_dir: str = ""

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS[:-1])
        one_of("kernels", self.kernels, KERNELS)
        within("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Run):
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sample_prompt: str = "ROMEO:"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.source == "fresh" and self.data.length > self.model.context:
            raise BadInput(
                f"data.length={self.data.length} is longer than model.context={self.model.context}; "
                f"write data.length={self.model.context} or model.context={self.data.length}"
            )
        pieces = self.trainer.accumulate * self.trainer.devices * self.trainer.nodes
        if self.data.batch % pieces:
            raise BadInput(
                f"data.batch={self.data.batch} cannot be cut into trainer.accumulate x trainer.devices x "
                f"trainer.nodes = {pieces} "
                f"equal parts; write data.batch={pieces * max(1, round(self.data.batch / pieces))}"
            )
        if self.adapter.name != "none" and self.trainer.strategy == "fsdp":
            raise BadInput(f"adapter={self.adapter.name} trains whole matrices; write trainer.strategy=ddp or auto")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Run):
    """One question: on `checkpoint`, or on fresh weights of `model`."""

    checkpoint: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    checkpoint: str = "runs/latest"
    prompt: str | None = None
    prompts_file: str | None = None  # one prompt a line, served as one batch
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0  # above 1: what was said already is less likely
    stop: str | None = None
    chat: bool = False  # the prompt is a message, put into the model's own chat template
    add_special_tokens: bool = True  # what the tokenizer adds to a text of its own: a beginning-of-text token, say
    parse_special: bool = False  # a prompt that spells a special token means it
    seed: int = 1234
    cache: bool = True
    stream: bool = True
    explain: str = "false"  # true: every pass, line by line; html: the generation as a page, generation.html
    logprobs: bool = False  # a JSON line a token, instead of text
    precision: str = "auto"  # auto: as exported
    kernels: str = "auto"  # the fastest here, measured once; or reference, plain PyTorch everywhere
    draft: str | None = None  # a smaller model's checkpoint, to propose tokens
    draft_tokens: int = 4  # that it proposes before each forward of the model
    compile: bool = False  # the decoding step
    lora: str | None = None  # directory of an adapter, served beside the base that it was trained on
    exact: bool = False  # the bits of training's forward, at a price

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens, 0)
        at_least("temperature", self.temperature, 0)
        at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadInput(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise BadInput(f"repetition_penalty={self.repetition_penalty} must be a positive number; 1 is none")
        one_of("explain", self.explain.lower(), ("false", "true", "html"))  # Hydra reads true as a bool
        if self.explain.lower() == "html" and (self.prompts_file is not None or self.precision == "int8"):
            raise BadInput("explain=html shows one prompt on the exported weights: leave out prompts_file= and int8")
        one_of("precision", self.precision, PRECISIONS)
        one_of("kernels", self.kernels, KERNELS)
        within("seed", self.seed, 0, 2**63 - 1)
        at_least("draft_tokens", self.draft_tokens, 1)
        if self.prompt is not None and self.prompts_file is not None:
            raise BadInput("give prompt= or prompts_file=, not both")
        if self.draft is not None and (self.prompts_file is not None or self.compile or not self.cache):
            raise BadInput("draft= serves one prompt, with a cache: leave out prompts_file=, compile= and cache=")
        if self.compile and not self.cache:
            raise BadInput("compile=true compiles the cached step: leave out cache=false")
        if self.exact and not self.cache:
            raise BadInput("exact=true decodes with a cache: leave out cache=false")
        if self.chat and self.prompt is None and self.prompts_file is None:
            raise BadInput("chat=true needs a message: prompt= or prompts_file=")
        if self.chat and (self.parse_special or not self.add_special_tokens):
            raise BadInput("chat=true has its special tokens from the template: leave out the other keys on them")
        if self.logprobs and self.explain.lower() != "false":
            raise BadInput("logprobs= and explain= show the same tokens in two ways: give one of them")
