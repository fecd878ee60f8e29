"""A loop of one's own: planted times land in their phase and nowhere else, and training is what it would have been."""

import asyncio
import code
import copy
import doctest
import io
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from isoforward import phase_costs
from isoforward.attach import plain_loop
from isoforward.attach.measurement import Measurement
from isoforward.attach.sampling import Sampling
from isoforward.base.errors import BadInput
from tests.attach import planted_training as plant

ALL = Sampling(every=1, warmup=0, count_flops=False)


def costs_of(model: nn.Module, optimizer: Optimizer, clock: plant.PlantedClock) -> plain_loop.StepCosts:
    measurement = Measurement(ALL, clock=clock, validation_by_mode=True)
    return plain_loop.StepCosts(measurement, model, optimizer)


def train(clock: plant.PlantedClock, *, batches: int, accumulate: int) -> plain_loop.StepCosts:
    """Two epochs, so that what comes after the steps of one is followed by a step."""
    model, criterion = plant.Model(clock), plant.Criterion(clock)
    optimizer = plant.update(model, clock)
    with plant.slow_clipping(clock), costs_of(model, optimizer, clock) as costs:
        for _ in range(2):
            for index, batch in enumerate(plant.loader(clock, batches)):
                loss = criterion(model(batch)) / accumulate
                loss.backward()
                if (index + 1) % accumulate == 0 or index + 1 == batches:
                    clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    clock.take(plant.CALLBACK)
            model.eval()
            for batch in plant.loader(clock, 2):
                with torch.no_grad():
                    model(batch)
                    clock.take(plant.VALIDATION)
            model.train()
            torch.save(plant.Checkpoint(clock), io.BytesIO())
    return costs


@pytest.fixture
def clock() -> plant.PlantedClock:
    return plant.PlantedClock()


def test_what_is_planted_in_a_phase_is_found_there_and_nowhere_else(clock: plant.PlantedClock) -> None:
    costs = train(clock, batches=6, accumulate=1)
    steps = costs.measurement.account.steps
    expected = plant.planted(1, residual=plant.CALLBACK)  # of what a callback is, a plain loop does not tell
    assert [plant.told(step.phases) for step in steps] == [expected] * 12
    rows = {row.phase: row.value for row in costs.phases.rows if row.quantity == "time" and row.life == "training"}
    validation = plant.fetched(2) + 2 * (plant.FORWARD + plant.VALIDATION)
    assert plant.told(rows) == expected | {
        "step": sum(expected.values()),
        "validation": 2 * validation,
        "checkpointing": 2 * plant.CHECKPOINT,
    }
    assert costs.phases.time("inference", "forward").value == plant.FORWARD


def test_three_micro_batches_make_one_step_and_seven_batches_three(clock: plant.PlantedClock) -> None:
    costs = train(clock, batches=7, accumulate=3)
    account = costs.measurement.account
    expected = [plant.planted(n, residual=plant.CALLBACK) for n in (3, 3, 1)] * 2
    assert [plant.told(step.phases) for step in account.steps] == expected
    assert costs.phases.time("training", "forward").value == 3 * plant.FORWARD
    assert costs.phases.time("training", "forward").conditions["micro_batches"] == 3
    assert costs.phases.time("inference", "forward").value == 3 * plant.FORWARD  # the same three batches


def test_every_moment_belongs_to_a_phase(clock: plant.PlantedClock) -> None:
    costs = train(clock, batches=7, accumulate=3)
    steps = costs.measurement.account.steps
    assert all(sum(step.phases.values()) == step.seconds for step in steps)


def test_training_is_bit_for_bit_what_it_would_have_been() -> None:
    model, state, random = {}, {}, {}
    for attached in (False, True):
        torch.manual_seed(7)
        own = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(own.parameters())
        with phase_costs(own, optimizer, every=2, warmup=1) if attached else nullcontext():
            for _ in range(20):
                loss = own(torch.randn(6, 4)).square().mean()
                loss.backward()
                clip_grad_norm_(own.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        model[attached], state[attached] = own.state_dict(), optimizer.state_dict()["state"]
        random[attached] = torch.get_rng_state()
        assert own.training and all(part.training for part in own.modules())
    assert all(torch.equal(value, model[True][name]) for name, value in model[False].items())
    assert all(
        torch.equal(state[False][k][name], state[True][k][name]) for k in state[False] for name in state[False][k]
    )
    assert torch.equal(random[False], random[True])


class Recomputes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))  # type: ignore[no-any-return]


def validated(clock: plant.PlantedClock, grad: bool, mode: bool) -> plain_loop.StepCosts:
    """Trained in train mode if `mode`, then in eval mode with or without gradients."""
    model = plant.Model(clock).train(mode)
    optimizer = plant.update(model, clock)
    with costs_of(model, optimizer, clock) as costs:
        for _ in range(2):
            for batch in plant.loader(clock, 4):
                model(batch).sum().backward()
                optimizer.step()
            model.eval()
            with torch.set_grad_enabled(grad):
                for batch in plant.loader(clock, 1):
                    model(batch)
            model.train(mode)
    return costs


def test_a_model_that_is_trained_in_eval_mode_is_not_always_validated(clock: plant.PlantedClock) -> None:
    account = validated(clock, False, False).measurement.account
    assert [step.phases["data"] for step in account.steps[:4]] == [plant.fetched(1)] * 4
    # Batches of both are alike: that of validation is training's, and the next of training validation's.
    assert plant.told(account.occasions_s) == {"validation": 2 * plant.FORWARD + plant.fetched(1)}


def test_eval_mode_with_gradients_is_a_forward_as_in_adversarial_training(clock: plant.PlantedClock) -> None:
    costs = validated(clock, True, True)
    assert plant.told(costs.measurement.account.occasions_s) == {"validation": 2 * plant.fetched(1)}
    assert "forward" in costs.measurement.account.steps[3].phases


@pytest.mark.parametrize("way", ["checkpointing", "autocast", "torch.compile"])
def test_weights_are_the_same_however_the_model_is_run(way: str) -> None:
    weights = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = Recomputes()
        run: Any = torch.compile(model, backend="aot_eager") if way == "torch.compile" else model
        optimizer = torch.optim.AdamW(model.parameters())
        with phase_costs(run, optimizer, every=2, warmup=1) if attached else nullcontext() as costs:
            for _ in range(12):
                with torch.autocast("cpu", enabled=way == "autocast", dtype=torch.bfloat16):
                    loss = run(torch.randn(5, 4)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert costs is not None and costs.phases.time("inference", "forward").value


def test_what_a_backward_computes_again_is_backward(clock: plant.PlantedClock) -> None:
    inner = plant.Model(clock)
    model = nn.ModuleDict({"inner": inner})
    optimizer = plant.update(model, clock)
    with costs_of(model, optimizer, clock) as costs:
        for batch in plant.loader(clock, 3):
            checkpoint(inner, batch, use_reentrant=False).sum().backward()
            optimizer.step()
    (step, *_) = costs.measurement.account.steps
    assert step.phases["forward"] == plant.FORWARD
    assert step.phases["backward"] == plant.BACKWARD + plant.FORWARD


def replaced() -> list[object]:
    from torch.optim import optimizer
    from torch.utils.data import DataLoader, dataloader

    return [
        torch.autograd.backward,
        torch.Tensor.to,
        torch.save,
        Optimizer.zero_grad,
        DataLoader.__iter__,
        dataloader._BaseDataLoaderIter.__next__,
        torch.nn.utils.clip_grad._get_total_norm,
        len(optimizer._global_optimizer_pre_hooks),
        len(optimizer._global_optimizer_post_hooks),
    ]


@pytest.mark.parametrize("error", [ZeroDivisionError("theirs"), KeyboardInterrupt("theirs")])
@pytest.mark.parametrize("place", ["collate", "forward", "backward", "step"])
def test_hooks_are_undone_and_an_error_of_the_loop_stays_what_it_is(
    place: str, error: BaseException, clock: plant.PlantedClock
) -> None:
    class Fails:
        """A clock that raises in the fifth step, while it is to wait for a part of it."""

        def __init__(self, seconds: float) -> None:
            self.seconds, self.calls = seconds, 0

        def __call__(self, seconds: float) -> None:
            self.calls += seconds == self.seconds
            if self.calls == 5:
                raise error
            clock.now += seconds

    before = replaced()
    model = plant.Model(clock)
    optimizer = plant.update(model, clock)
    seconds = {"collate": plant.COLLATE, "forward": plant.FORWARD, "backward": plant.BACKWARD, "step": plant.UPDATE}
    clock.take = Fails(seconds[place])  # type: ignore[method-assign]
    with pytest.raises(type(error)) as raised, costs_of(model, optimizer, clock) as costs:
        for batch in plant.loader(clock, 6):
            model(batch).sum().backward()
            optimizer.step()
    assert raised.value is error
    assert replaced() == before
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert {row.life for row in costs.phases.rows} == {"training"}
    assert costs.phases.time("training", "forward").samples == (plant.FORWARD,) * 4


def test_a_loop_that_goes_on_after_an_error_is_accounted_for_again(clock: plant.PlantedClock) -> None:
    model = plant.Model(clock)
    optimizer = plant.update(model, clock)
    with costs_of(model, optimizer, clock) as costs:
        for index, batch in enumerate(plant.loader(clock, 6)):
            with suppress(RuntimeError):
                loss = model(batch if index != 2 else batch[:, :3]).sum()  # of another shape
                loss.backward()
                optimizer.step()
    steps = [plant.told(step.phases) for step in costs.measurement.account.steps]
    whole = {phase: s for phase, s in plant.planted(1).items() if phase not in ("clipping", "loss")}
    assert [steps[at] for at in (0, 1, 3, 4)] == [whole] * 4
    assert steps[2] == whole | {"data": plant.fetched(2), "forward": 2 * plant.FORWARD}  # and the batch that failed


def test_a_loop_that_never_calls_backward_gets_no_rows_and_a_reason(clock: plant.PlantedClock) -> None:
    model = plant.Model(clock)
    with costs_of(model, plant.update(model, clock), clock) as costs:
        for batch in plant.loader(clock, 4):
            model(batch)
    assert not costs.phases.rows and not costs.phases.trusted
    assert "No training step was timed: nothing was trained" in " ".join(str(costs).split())


def test_costs_are_read_after_the_loop() -> None:
    with phase_costs() as costs, pytest.raises(BadInput, match="after the `with` block"):
        _ = costs.phases


def test_a_model_that_is_not_named_is_found_by_its_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters())
    average = copy.deepcopy(model)
    with phase_costs(every=1, warmup=1) as costs:
        for _ in range(8):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            average(torch.ones(2, 4))
    assert costs.measurement.hooks.roots == [model]
    assert costs.phases.time("training", "forward").conditions["model"] == "Sequential"


def test_two_models_and_two_optimizers_share_a_step(clock: plant.PlantedClock) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"generator": plant.Model(clock), "critic": plant.Model(clock)})

    both = Both()
    first, second = (plant.update(part, clock) for part in both.parts.values())
    with costs_of(both, first, clock) as costs:
        for batch in plant.loader(clock, 5):
            for optimizer in (first, second):
                out = both.parts["critic"](both.parts["generator"](batch))
                clock.take(plant.LOSS)
                optimizer.zero_grad()
                out.sum().backward()
                optimizer.step()
    expected = {"data": plant.BATCH * plant.ITEM + plant.COLLATE, "forward": 4 * plant.FORWARD, "loss": 2 * plant.LOSS}
    expected |= {"backward": 4 * plant.BACKWARD, "optimizer": 2 * plant.UPDATE}
    assert [plant.told(step.phases) for step in costs.measurement.account.steps] == [expected] * 5


def test_a_closure_has_phases_of_its_own(clock: plant.PlantedClock) -> None:
    model, criterion = plant.Model(clock), plant.Criterion(clock)
    optimizer = plant.update(model, clock)

    def batches() -> Iterator[Tensor]:
        yield from plant.loader(clock, 5)

    with costs_of(model, optimizer, clock) as costs:
        for batch in batches():

            def closure(batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = criterion(model(batch))
                loss.backward()
                return loss

            optimizer.step(closure)
    expected = {phase: seconds for phase, seconds in plant.planted(1).items() if phase != "clipping"}
    assert [plant.told(step.phases) for step in costs.measurement.account.steps] == [expected] * 5


def test_cells_of_a_notebook_measure_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    """As a kernel runs them: typed one after the other, in a module without a file, while an event loop runs."""
    cells = (
        "import torch; from isoforward import phase_costs",
        "model = torch.nn.Linear(4, 2); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
        "costs = phase_costs(model, optimizer, every=1, warmup=1).__enter__()",
        "for _ in range(9): model(torch.ones(3, 4)).sum().backward(); optimizer.step(); optimizer.zero_grad()",
        "_ = costs.__exit__(None, None, None)",
        "costs",
    )

    async def kernel() -> None:
        console = code.InteractiveInterpreter({"__name__": "__main__"})
        for cell in cells:
            console.runcode(compile(cell + "\n", "<cell>", "single"))

    asyncio.run(kernel())
    shown = capsys.readouterr()
    told = " ".join(shown.out.split())
    assert "A training step takes" in told and "its forward in inference" in told
    assert max(len(line) for line in shown.out.splitlines()) <= 80
    assert not shown.err


def test_the_doctest_holds() -> None:
    found = doctest.testmod(plain_loop)
    assert found.attempted >= 7 and not found.failed
