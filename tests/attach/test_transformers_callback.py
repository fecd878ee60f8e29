"""`PhaseCostsCallback` in Transformers' own Trainer, on a tiny model with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from isoforward import PhaseCostsCallback, read
from tests.attach import planted_training as plant


class Model(GPT2LMHeadModel):
    clock: plant.PlantedClock

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.take(plant.FORWARD)
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = plant._Backward.apply(output.loss, self.clock)
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.clock.take(plant.CHECKPOINT)


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, clock: plant.PlantedClock, count: int) -> None:
        self.clock, self.count = clock, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.clock.take(plant.ITEM)
        tokens = (torch.arange(8) + index) % 32
        return {"input_ids": tokens, "labels": tokens}


class Slow(TrainerCallback):  # type: ignore[misc]
    def __init__(self, clock: plant.PlantedClock) -> None:
        self.clock, self.logged = clock, []  # type: ignore[var-annotated]

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.take(plant.VALIDATION)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.take(plant.CALLBACK)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


def trainer_of(where: Path, clock: plant.PlantedClock, *callbacks: Any, **more: Any) -> Trainer:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 8}
    model = Model(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.clock = clock

    def loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        clock.take(plant.LOSS)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    model.loss_function = loss

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        clock.take(plant.COLLATE)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    arguments = TrainingArguments(
        str(where), per_device_train_batch_size=plant.BATCH, use_cpu=True, num_train_epochs=1, disable_tqdm=True,
        report_to=[], logging_steps=1, seed=1, remove_unused_columns=False, **more,
    )  # fmt: skip
    count = 7 * plant.BATCH
    return Trainer(model, arguments, train_dataset=Tokens(clock, count), eval_dataset=Tokens(clock, plant.BATCH),
                   optimizers=(plant.update(model, clock), None), data_collator=collate,
                   callbacks=list(callbacks))  # fmt: skip


def test_what_is_planted_in_a_phase_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts, clock = plant.watched_accounts(monkeypatch), plant.PlantedClock()
    costs = PhaseCostsCallback(every=1, warmup=0, flops=False, clock=clock)
    slow = Slow(clock)
    trainer = trainer_of(
        tmp_path, clock, costs, slow, gradient_accumulation_steps=3, eval_strategy="epoch", save_strategy="epoch"
    )
    with plant.slow_clipping(clock):
        trainer.train()
    (account,) = accounts
    expected = [plant.planted(n, logging=plant.CALLBACK) for n in (3, 3, 1)]
    found = [plant.told(step.phases) for step in account.steps]
    for step, batches in zip(expected, (4, 3, 0), strict=True):  # accelerate's loader fetches one batch ahead
        step["data"] = plant.fetched(batches)
    assert found == [plant.told(step) for step in expected]
    validation = plant.fetched(1) + plant.FORWARD + plant.LOSS + plant.VALIDATION
    assert account.occasions_s == {"validation": validation, "checkpointing": plant.CHECKPOINT}
    assert costs.phases is not None
    assert costs.phases.time("inference", "forward").value == 3 * plant.FORWARD  # without the loss
    assert read(tmp_path / "phase_costs" / "results.jsonl").rows == costs.phases.rows
    with_figures = ["phase/forward_s" in logs for logs in slow.logged]
    assert with_figures == [False, True, True, False, False]  # three steps, of which none is known at the first
    assert {"loss", "phase/optimizer_s", "phase/step_s"} <= slow.logged[2].keys()


def test_weights_are_what_they_are_without_it(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [PhaseCostsCallback(every=2, warmup=1)]):
        trainer = trainer_of(tmp_path, plant.PlantedClock(), *callbacks, save_strategy="no")
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_a_model_that_the_trainer_compiles_is_watched_from_outside(tmp_path: Path) -> None:
    weights, costs = [], PhaseCostsCallback(every=2, warmup=1)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 8}
    for callbacks in ([], [costs]):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 24
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, use_cpu=True, num_train_epochs=1, disable_tqdm=True,
            report_to=[], save_strategy="no", torch_compile=True, torch_compile_backend="aot_eager",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert costs.phases is not None
    assert costs.phases.time("training", "forward").conditions["model"] == "GPT2LMHeadModel"
    (flops,) = (row for row in costs.phases.rows if row.quantity == "flops")
    assert flops.value is None and "compiled" in str(flops.reason)
    assert costs.phases.time("inference", "forward").value


def test_a_training_that_is_interrupted_keeps_its_rows_and_its_interrupt(tmp_path: Path) -> None:
    class Interrupts(TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    backward, clock = torch.autograd.backward, plant.PlantedClock()
    costs = PhaseCostsCallback(every=1, warmup=0, flops=False, clock=clock)
    trainer = trainer_of(tmp_path, clock, Interrupts(), costs, save_strategy="no", gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.autograd.backward is backward and not trainer.model._forward_pre_hooks
    found = read(tmp_path / "phase_costs" / "results.jsonl")
    assert {row.life for row in found.rows} == {"training"}
    assert next(row for row in found.rows if row.phase == "forward").samples == (2 * plant.FORWARD,) * 2
    assert (tmp_path / "phase_costs" / "report.html").is_file()


def test_a_training_that_never_calls_backward_has_neither_backward_nor_loss(tmp_path: Path) -> None:
    class Skips(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            model.train()
            with torch.no_grad():
                return model(**inputs).loss  # type: ignore[no-any-return]

    clock = plant.PlantedClock()
    costs = PhaseCostsCallback(every=1, warmup=0, flops=False, clock=clock)
    trainer = trainer_of(tmp_path, clock, costs, save_strategy="no", max_grad_norm=0.0)
    trainer.__class__ = Skips
    trainer.train()
    assert costs.phases is not None
    phases = {row.phase for row in costs.phases.rows if row.life == "training" and row.quantity == "time"}
    assert {"data", "forward", "optimizer", "step"} <= phases and "backward" not in phases


def test_a_step_that_raises_is_theirs_and_the_hooks_are_undone(tmp_path: Path) -> None:
    class Fails(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise ZeroDivisionError("theirs")

    backward, clock = torch.autograd.backward, plant.PlantedClock()
    for _ in range(2):  # a Trainer may be tried again
        costs = PhaseCostsCallback(every=1, warmup=0, flops=False, clock=clock)
        trainer = trainer_of(tmp_path, clock, Fails(), save_strategy="no")
        trainer.add_callback(costs)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="theirs"):
                trainer.train()
            assert torch.autograd.backward is backward and costs.measurement is None
            assert costs.phases is not None
            assert costs.phases.time("training", "forward").samples == (plant.FORWARD,) * 5
