"""A case is measured in a process of its own, on its own copy of the weights, so that measuring changes nothing.

What is compared is interleaved: every round runs every candidate once, in an order drawn anew, so that the samples of
one round share the machine's mood. Time, memory and FLOPs are never taken in one pass.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isoforward.base import stopwatch
from isoforward.base.config import MeasureConfig, ModelConfig, OptimConfig
from isoforward.base.environment import environment, reference_kernel
from isoforward.base.errors import BadInput
from isoforward.base.estimates import interleaved, summarise
from isoforward.base.results import Condition, Row, write
from isoforward.base.stopwatch import clock_for
from isoforward.base.subprocesses import Failed, run_isolated
from isoforward.formats.export import load_trainable
from isoforward.measure.trust import Watch, judge_trust
from isoforward.model import cost
from isoforward.model.autotune import backward_of, choose_backward
from isoforward.model.gpt import GPT
from isoforward.serve.inference import DTYPES

Laps = Mapping[str, list[dict[str, float]]]  # by candidate, a round each: seconds by name
Candidates = Mapping[str, Callable[[], dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured. `export` gives the weights; without it they are drawn from `seed`."""

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
    threads: int | None = None
    seed: int = 1234
    optim: OptimConfig = field(default_factory=OptimConfig)
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
        return own | dict(self.labels) | more

    def training(self, **more: Condition) -> dict[str, Condition]:
        own: dict[str, Condition] = {"batch": self.batch, "length": self.length, "tokens": self.batch * self.length}
        shape = {"batch": self.micro_batch, "length": self.length}
        if backward_of(self.model, DTYPES[self.precision], torch.device(self.device), **shape) == "plain":
            own["attention_backward"] = "plain"
        return self.conditions(**own, optimizer=self.optim.name, **more)

    def pack(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> Case:
        parts = {"model": ModelConfig, "optim": OptimConfig, "measure": MeasureConfig}
        return cls(**{key: parts[key](**value) if key in parts else value for key, value in packed.items()})


def apart(case: Case, target: str, results: Path, command: str, **more: Any) -> Any:
    """Runs `target` ("module:function") on this case in a fresh process. Its failure is a BadInput with the reason."""
    packed = {"case": case.pack(), "results": str(results), "command": command, **more}
    return done(run_isolated(target, packed, threads=case.threads), target.partition(":")[2].replace("_", " "))


def done(outcome: Any, what: str) -> Any:
    if isinstance(outcome, Failed):
        raise BadInput(f"{what} could not be measured: {outcome.reason}")
    return outcome


def master_of(case: Case) -> GPT:
    """With fp32 weights, as training holds them."""
    dtype = DTYPES[case.precision]
    if case.export is not None:
        model = load_trainable(Path(case.export), dtype=dtype, checkpointing=case.checkpointing)
    else:
        torch.manual_seed(case.seed)
        model = GPT(case.model, dtype=dtype, checkpointing=case.checkpointing)
    choose_backward(model, torch.device(case.device), batch=case.micro_batch, length=case.length)
    return model.to(case.device).train()


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Random tokens: what a phase costs does not depend on what the text says."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.length + 1)
    tokens = torch.randint(case.model.vocabulary, shape, generator=generator).to(case.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def row(case: Case, **fields: Any) -> Row:
    return Row(experiment=case.experiment, **fields)


def timed(samples: list[float], **fields: Any) -> dict[str, Any]:
    """The median of `samples` with its interval, as fields of a row."""
    estimate = summarise(samples)
    return {
        "quantity": "time",
        "unit": "s",
        "value": estimate.median,
        "low": estimate.low,
        "high": estimate.high,
        "samples": tuple(samples),
        **fields,
    }


def differing_logits(master: nn.Module, frozen: nn.Module, tokens: Tensor) -> int:
    """How many of the frozen forward's logits are not, bit for bit, those of training's forward."""
    trained = master.eval()(tokens).detach()
    master.train()
    with torch.inference_mode():
        served = frozen(tokens)
    return int((trained != served).sum())


def identity_row(case: Case, master: nn.Module, frozen: nn.Module, tokens: Tensor) -> Row:
    """Every comparison begins with it, on its own weights."""
    conditions = case.conditions(logits=tokens.numel() * case.model.vocabulary)
    differing = float(differing_logits(master, frozen, tokens))
    about = {"life": "inference", "phase": "forward", "quantity": "identity", "unit": "differing logits", "per": "run"}
    return row(case, **about, value=differing, conditions=conditions)


def spent(case: Case, work: Callable[[], object]) -> float:
    return stopwatch.spent(clock_for(torch.device(case.device)), work)


def record(packed: Mapping[str, Any], candidates: Candidates, tell: Callable[[Laps, Laps], Iterable[Row]]) -> str:
    """Warms up, runs all rounds, and appends what `tell` makes of the laps and of the very first, cold ones.

    Gives the id of the environment that the rows are tied to.
    """
    case = Case.unpack(packed["case"])
    where = environment(packed["command"], torch.device(case.device))
    with Watch(reference_kernel(case.device)) as watch:
        cold = {name: [run()] for name, run in candidates.items()}
        interleaved(candidates, case.measure.warmup - 1, seed=case.seed)
        gc.collect()
        laps = interleaved(candidates, case.measure.repeats, seed=case.seed + 1)
    rows = [dataclasses.replace(row, environment=where.id) for row in tell(laps, cold)]
    judged = judge_trust(case.experiment, rows, watch, environment=where.id)
    write(Path(packed["results"]), [where, *rows, judged])
    return where.id
