"""What a run is: frozen, typed, validated where it is built, with no import beyond the standard library."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from isoforward.base.architecture import CHOICES, FAMILIES, Architecture, checked_rope_scaling
from isoforward.base.checks import Checked, at_least, duration_s, key, one_of, positive, sized, within
from isoforward.base.errors import BadInput

VALIDATION_ROWS = 8  # sequences that trainer.validation_batches counts as one
PRECISIONS = ("auto", "fp32", "bf16", "int8")  # int8 serves alone: nothing is trained in it
KERNELS = ("auto", "reference")  # the fastest here, or PyTorch's plain ones, the same on every run
KERNELS_VARIABLE = "ISOFORWARD_KERNELS"  # of the environment: for a process and those that it starts
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """A decoder-only model. `family` presets what architecture.py lists; each of that can be set on its own.

    `source` says where weights come from: `fresh` (drawn from the seed), `hf` (a checkpoint at `path` of one of the
    families, read into our forward) or `transformers` (any causal LM at `path`, wrapped as it is).
    """

    prefix = "model."
    family: str = key("gpt2", one_of, tuple(FAMILIES))
    layers: int = key(4, sized)
    heads: int = key(4, sized)
    kv_heads: int | None = key(None, sized)  # None: one per head
    width: int = key(128, sized)
    head_dim: int | None = key(None, sized)  # None: width / heads
    ffn: int | None = key(None, sized)  # None: 4 x width (gelu), 8/3 x width rounded up to 64 (swiglu, geglu)
    context: int = key(256, sized)
    vocab: int | None = key(None, sized)  # None: the tokenizer's
    tied: bool = True
    norm: str | None = key(None, one_of, CHOICES["norm"])  # None, here and in the next six: the family's
    norm_position: str | None = key(None, one_of, CHOICES["norm_position"])
    mlp: str | None = key(None, one_of, CHOICES["mlp"])
    positions: str | None = key(None, one_of, CHOICES["positions"])
    qk_norm: str | None = key(None, one_of, CHOICES["qk_norm"])
    bias: bool | str | None = key(None, one_of, CHOICES["bias"])  # true and false are all and none
    scaled_embedding: bool | None = None
    dropout: float = key(0.0, within, 0.0, 0.99)
    norm_eps: float = key(1e-5, positive)
    rope_theta: float = key(10000.0, positive)
    # A dict: type (linear, dynamic, yarn, llama3) and its settings, or Transformers' rope_type. Any, since OmegaConf
    # merges no dict into an optional one
    rope_scaling: Any = None
    source: str = key("fresh", one_of, ("fresh", "hf", "transformers"))
    path: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bias, bool):
            object.__setattr__(self, "bias", "all" if self.bias else "none")
        super().__post_init__()
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
class DataConfig(Checked):
    """Where text comes from, how it becomes tokens, and the shape of one optimizer step's batch."""

    prefix = "data."
    source: str = key("shakespeare", one_of, ("shakespeare", "text", "hub", "synthetic"))
    path: str | None = None  # source=text: a file, directory or glob
    name: str | None = None  # source=hub: a dataset's name
    column: str = "text"  # the column that holds the text; a dot leads into nested ones
    tokenizer: str = "bpe"  # char, bpe, gpt2 or the path of a tokenizer.json
    vocab: int = key(1024, sized, 257)  # tokenizer=bpe: how many tokens to learn
    validation: float = key(0.1, within, 0.0, 0.9)  # share of documents; shakespeare declares its plays instead
    batch: int = key(8, sized)  # sequences of one optimizer step, over all devices
    length: int = key(256, sized)  # tokens of one sequence
    workers: int = key(0, within, 0, 1024)
    cache_dir: str | None = None  # None: $XDG_CACHE_HOME/isoforward or ~/.cache/isoforward

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "text" and not self.path:
            raise BadInput("data=text needs data.path=FILE, DIRECTORY or GLOB")
        if self.source == "hub" and not self.name:
            raise BadInput("data=hub needs data.name=DATASET")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    prefix = "optim."
    name: str = key("adamw", one_of, ("adamw", "adam", "sgd", "muon"))
    lr: float = key(3e-3, at_least, 0)
    min_lr: float = key(0.1, within, 0.0, 1.0)  # as a share of lr, reached at the last step
    schedule: str = key("cosine", one_of, ("cosine", "linear", "constant"))
    warmup_steps: int = key(50, at_least, 0)
    weight_decay: float = key(0.1, at_least, 0)
    beta1: float = key(0.9, within, 0.0, 0.9999999)
    beta2: float = key(0.95, within, 0.0, 0.9999999)
    momentum: float = key(0.95, within, 0.0, 0.9999999)  # sgd, muon
    muon_lr: float = key(0.02, at_least, 0)  # matrices under name=muon; everything else takes lr
    clip: float | None = 1.0  # None: the gradient's norm is measured but not cut

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and not self.clip > 0:
            raise BadInput(f"optim.clip={self.clip} must be positive, or null for none")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked):
    """What of a model is trained: all of it, named parts alone (frozen), or low-rank maps beside frozen ones (lora)."""

    prefix = "adapter."
    name: str = key("none", one_of, ("none", "lora", "frozen"))
    targets: list[str] = field(default_factory=list)  # lora: q, k, v, out, ...; frozen: head, blocks.3, ...
    rank: int = key(8, sized)
    alpha: float = key(16.0, positive, 2**53)  # what a low-rank map gives is multiplied by alpha / rank
    base: str = key("full", one_of, ("full", "int8"))  # lora: the blocks' frozen matrices as they are, or in int8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base == "int8" and self.name != "lora":
            raise BadInput(f"adapter.base=int8 holds what stays frozen beside adapter=lora, not {self.name}")

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
class TrainerConfig(Checked):
    prefix = "trainer."
    max_steps: int = key(700, at_least, 1)
    max_time: str | None = key(None, duration_s)  # of this start: 2h, 90m, 1h30m, HH:MM:SS or DD:HH:MM:SS
    accelerator: str = key("auto", one_of, ("auto", "cpu", "gpu"))
    devices: int = key(1, at_least, 1)  # of each machine
    nodes: int = key(1, at_least, 1)  # machines; more than one are started by torchrun
    strategy: str = key("auto", one_of, ("auto", "ddp", "fsdp"))
    accumulate: int = key(1, at_least, 1)  # micro-batches that one optimizer step is cut into
    checkpointing: str = key("none", one_of, ("none", "selective", "full"))  # activations kept, or recomputed
    validate_every: int = key(100, at_least, 1)
    validation_batches: int = key(8, at_least, 1)  # of 8 sequences, whatever data.batch is: the same text is judged
    checkpoint_every: int = key(100, at_least, 1)
    resume: str | None = None  # a checkpoint or run directory, or auto
    early_stopping: int | None = key(None, at_least, 1)  # validations without improvement
    profiler: str | None = key(None, one_of, ("pytorch",))  # three steps in trace.json, which a browser opens
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (judged := self.validation_batches * VALIDATION_ROWS) < (world := self.devices * self.nodes):
            raise BadInput(
                f"trainer.validation_batches={self.validation_batches} validates on {judged} sequences, and each of "
                f"{world} devices needs one; write trainer.validation_batches={math.ceil(world / VALIDATION_ROWS)}"
            )


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(Checked):
    """How precisely is measured, and for how long at most.

    Measuring ends when every time is known to `precision` and every comparison is decided, or when `budget` is spent.
    """

    prefix = "measure."
    enabled: bool = True
    precision: float = key(0.05, within, 1e-4, 1.0)  # half-width of a time's interval, relative to what it is a part of
    budget: float = key(40.0, within, 0.01, 86400)  # seconds, for all that one process times
    margin: float = key(0.03, within, 1e-4, 1.0)  # relative difference below which two times count as equal
    repeats: int | None = key(None, at_least, 5)  # a fixed number of samples instead of precision and budget
    processes: int = key(1, within, 1, 64)  # fresh ones; from 3 on, what varies between them is in the interval
    warmup: int = key(3, at_least, 1)
    prompt: int = key(64, at_least, 1)  # tokens of the prefill; the decode starts there
    new_tokens: int = key(64, at_least, 2)  # decode steps of one measured generation
    context: int = key(1024, at_least, 2)  # the longest past that the cache curve looks at
    energy: str = "auto"  # auto: measured or unavailable; or a wattage to estimate with, such as 65W

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes == 2:
            raise BadInput("measure.processes=2 does not show how much processes vary; write 1, or at least 3")
        if self.energy != "auto":
            try:
                watts = float(self.energy.removesuffix("W"))
            except ValueError:
                watts = -1.0
            if not watts > 0:
                raise BadInput(f"measure.energy={self.energy} must be auto or a wattage such as 65W")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Checked):
    prefix = "tracking."
    # auto: as $WANDB_MODE says; where it says nothing, online where a key is set, else offline
    mode: str = key("auto", one_of, ("auto", "wandb", "none"))
    project: str | None = None  # None: $WANDB_PROJECT or isoforward
    entity: str | None = None  # None: $WANDB_ENTITY, or the key's own
    group: str | None = None  # None: $WANDB_RUN_GROUP, or the run directory, which ties both lives of one model
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Run(Checked):
    """What every command shares."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hardware: str = "here"  # here, a name of the built-in table, or a file made by calibrate
    precision: str = key("auto", one_of, PRECISIONS[:-1])
    kernels: str = key("auto", one_of, KERNELS)  # the fastest here, measured once; or plain PyTorch everywhere
    compile: bool = False
    seed: int = key(1234, within, 0, LARGEST_SEED)
    run_dir: str = ""


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
class GenerateConfig(Checked):
    checkpoint: str = "runs/latest"
    prompt: str | None = None
    prompts_file: str | None = None  # one prompt a line, served as one batch
    max_new_tokens: int = key(200, at_least, 0)
    temperature: float = key(0.8, at_least, 0)  # 0: greedy
    top_k: int | None = key(None, at_least, 1)
    top_p: float | None = None
    repetition_penalty: float = 1.0  # above 1: what was said already is less likely
    stop: str | None = None
    chat: bool = False  # the prompt is a message, put into the model's own chat template
    add_special_tokens: bool = True  # what the tokenizer adds to a text of its own: a beginning-of-text token, say
    parse_special: bool = False  # a prompt that spells a special token means it
    seed: int = key(1234, within, 0, LARGEST_SEED)
    cache: bool = True
    stream: bool = True
    explain: bool | str = False  # true: every pass, line by line; html: the generation as a page, generation.html
    logprobs: bool = False  # a JSON line a token, instead of text
    precision: str = key("auto", one_of, PRECISIONS)  # auto: as exported
    kernels: str = key("auto", one_of, KERNELS)
    draft: str | None = None  # a smaller model's checkpoint, to propose tokens
    draft_tokens: int = key(4, at_least, 1)  # that it proposes before each forward of the model
    compile: bool = False  # the decoding step
    lora: str | None = None  # directory of an adapter, served beside the base that it was trained on
    exact: bool = False  # the bits of training's forward, at a price

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadInput(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise BadInput(f"repetition_penalty={self.repetition_penalty} must be a positive number; 1 is none")
        explain, several = str(self.explain).lower(), self.prompts_file is not None
        one_of("explain", explain, ("false", "true", "html"))
        if explain == "html" and (several or self.precision == "int8"):
            raise BadInput("explain=html shows one prompt on the exported weights: leave out prompts_file= and int8")
        if self.prompt is not None and several:
            raise BadInput("give prompt= or prompts_file=, not both")
        if self.draft is not None and (several or self.compile or not self.cache):
            raise BadInput("draft= serves one prompt, with a cache: leave out prompts_file=, compile= and cache=")
        if self.compile and not self.cache:
            raise BadInput("compile=true compiles the cached step: leave out cache=false")
        if self.exact and not self.cache:
            raise BadInput("exact=true decodes with a cache: leave out cache=false")
        if self.chat and self.prompt is None and not several:
            raise BadInput("chat=true needs a message: prompt= or prompts_file=")
        if self.chat and (self.parse_special or not self.add_special_tokens):
            raise BadInput("chat=true has its special tokens from the template: leave out the other keys on them")
        if self.logprobs and explain != "false":
            raise BadInput("logprobs= and explain= show the same tokens in two ways: give one of them")
