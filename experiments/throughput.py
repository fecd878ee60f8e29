"""How many tokens a second does training through the Lightning module reach, against the usual fp32 PyTorch loop?

Both train the same baby GPT in one process, a step of each in turn: the plain one between two of Lightning's batches.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from isoforward import steps, units
from isoforward.compare import only
from isoforward.config import ExperimentConfig, TrainerConfig
from isoforward.entry import run
from isoforward.experiment import ask
from isoforward.hardware import environment, reference_kernel
from isoforward.lit import LitGPT, quieten
from isoforward.measuring.case import Case, batch_of, master_of, row, spent, timed
from isoforward.measuring.estimates import ratio
from isoforward.measuring.watch import Watch, judge_trust
from isoforward.meter import clock_for
from isoforward.results import Results, Row, write


class PlainLoop(Callback):
    """The usual loop: fp32 throughout, `loss.backward()`, `clip_grad_norm_`, torch's default AdamW."""

    def __init__(self, case: Case, batch: tuple[Tensor, Tensor]) -> None:
        self.case, (self.tokens, self.targets) = case, batch
        self.model = master_of(dataclasses.replace(case, precision="fp32"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        self.clock = clock_for(torch.device(case.device))
        self.plain_s: list[float] = []
        self.lightning_s: list[float] = []

    def step(self) -> None:
        loss = steps.next_token_loss(self.model(self.tokens), self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def on_train_batch_start(self, *_: Any) -> None:
        self.plain_s.append(spent(self.case, self.step))
        self.start = self.clock.mark()

    def on_train_batch_end(self, *_: Any) -> None:
        self.lightning_s.append(self.clock.seconds(self.start, self.clock.mark()))


def measure(packed: dict) -> None:
    case = Case.unpack(packed["case"])
    where = environment(packed["command"], torch.device(case.device))
    batch = batch_of(case)
    rounds = case.measure.warmup + case.measure.repeats
    module = LitGPT(master_of(case), case.optim, TrainerConfig(max_steps=rounds))
    if case.compile:
        module.model.compile()
    plain = PlainLoop(case, batch)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    quieten()
    trainer = Trainer(
        accelerator="cpu" if case.device == "cpu" else "gpu", max_steps=rounds, callbacks=[plain], **quiet
    )
    with Watch(reference_kernel(case.device)) as watch:
        trainer.fit(module, DataLoader([batch] * rounds, batch_size=None))

    def tell() -> Iterator[Row]:
        for name, samples in (("plain fp32 loop", plain.plain_s), ("Lightning module", plain.lightning_s)):
            at = {"life": "training", "phase": "step", "per": "step", "conditions": case.training(through=name)}
            yield row(case, **at, **timed(samples[case.measure.warmup :]), environment=where.id)

    rows = list(tell())
    write(Path(packed["results"]), [where, *rows, judge_trust(case.experiment, rows, watch, environment=where.id)])


def answer(results: Results) -> str:
    plain, ours = (only(results, through=name) for name in ("plain fp32 loop", "Lightning module"))
    found = ratio(plain.samples, ours.samples)
    rates = [units.count(r.conditions["tokens"] / r.value) for r in (plain, ours)]
    return (
        f"The plain fp32 loop trains {rates[0]} tokens/s, the Lightning module {rates[1]}: "
        f"{units.times(found.value)} ({found.low:.2f} to {found.high:.2f})."
    )


def main(config: ExperimentConfig) -> None:
    ask(config, "throughput", "throughput:measure", answer)


if __name__ == "__main__":
    sys.exit(run(main, "throughput", ExperimentConfig))
