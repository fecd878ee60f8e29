"""The public interface: what it measures of any module, what it leaves untouched, and that importing it is free."""

import copy
import doctest
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isoforward
from isoforward import compare_phases, read
from isoforward.app import any_module
from isoforward.base.disturbance import Disturbance
from isoforward.base.errors import BadInput
from isoforward.model.gpt import GPT
from tests.conftest import tiny


class Slow(nn.Module):
    """Forward and backward take as long as they are told."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.forward_s)
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(lambda gradient: time.sleep(self.backward_s))
        return y


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample is taken again because the machine is busy with other tests."""
    monkeypatch.setattr(Disturbance, "disturbed", False)


X = torch.randn(8, 4)


def test_the_doctests_hold() -> None:
    for module in (any_module, isoforward):
        assert doctest.testmod(module).failed == 0
    assert doctest.testmod(any_module).attempted >= 8


def test_a_delay_planted_in_a_phase_is_found_there() -> None:
    found = compare_phases(Slow(0.02, 0.05), (X, X), loss=nn.functional.mse_loss, repeats=5, warmup=1)

    def seconds(life: str, phase: str) -> float:
        value = found.time(life, phase).value
        assert value is not None
        return value

    assert 0.02 <= seconds("training", "forward") < 0.05
    assert seconds("training", "backward") >= 0.05
    assert seconds("inference", "forward") >= 0.02
    assert seconds("training", "optimizer") < 0.02
    assert found.against_forward("backward").value > 1.5


def test_measuring_leaves_model_and_optimizer_as_they_were() -> None:
    model = GPT(tiny(dropout=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # at 0.5 it diverges for some weights
    tokens = torch.randint(61, (2, 13))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    compare_phases(model, (tokens[:, :-1], tokens[:, 1:]), optimizer=optimizer, repeats=5, warmup=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not optimizer.state and model.training
    assert torch.equal(random, torch.get_rng_state())


def test_a_model_of_transformers_is_measured_by_its_logits() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 64}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32))
    tokens = torch.randint(64, (2, 9))
    found = compare_phases(model, (tokens[:, :-1], tokens[:, 1:]), repeats=5, warmup=1)
    assert {row.conditions["model"] for row in found.rows} == {"OPTForCausalLM"}


def test_what_is_printed_and_written_is_what_was_measured(tmp_path: Path) -> None:
    found = compare_phases(nn.Linear(4, 4), (X, X), loss=nn.functional.mse_loss, repeats=5, warmup=1)
    for word in ("forward", "backward", "optimizer", "residual", "trusted" if found.trusted else "with care"):
        assert word in str(found)
    found.write(tmp_path / "results.jsonl")
    assert read(tmp_path / "results.jsonl").rows == found.rows
    (pairs,) = (each for each in found.results.comparisons if each.first.phase == "step")
    assert found.against_forward("step") == pairs.ratio
    assert pairs.second.life == "inference"
    with pytest.raises(BadInput, match="decode"):
        found.time("inference", "decode")


def test_a_step_has_its_gradients_where_the_caller_has_switched_them_off() -> None:
    """Case 26 of what people bring."""
    model, batch = torch.nn.Linear(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    with torch.no_grad():
        told = compare_phases(model, batch, loss=torch.nn.functional.cross_entropy, repeats=5, warmup=1)
        assert not torch.is_grad_enabled()
    assert "backward" in str(told)


class Labelled(nn.Module):
    """As a model of Transformers takes a batch and answers: by keyword, with its own loss where it has labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.head.weight = self.embedding.weight

    def forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> dict[str, Any]:
        logits = self.head(self.embedding(input_ids))
        logits = logits if mask is None else logits * mask[..., None]
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class OfPair(nn.Linear):
    def forward(self, batch: Pair) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(batch.x), batch.x


class Summed(nn.Linear):
    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(one + other)


def last_of(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output[0], targets)


IDS = torch.randint(50, (8, 6))
SOME = IDS.where(torch.arange(6) > 2, -100)  # a prompt, whose tokens count for nothing
MASK = torch.ones(8, 6)
NORMED = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [
        (Labelled(), {"input_ids": IDS, "mask": MASK, "labels": SOME}, None),
        (Labelled(), ({"input_ids": IDS, "mask": MASK}, SOME), lambda out, y: last_of([out["logits"][..., 0]], y / 50)),
        (OfPair(4, 4), Pair(X, X), lambda out, batch: last_of(out, batch.y)),
        (Summed(4, 4), ([X, X], X), nn.functional.mse_loss),
        (NORMED, (X, X), nn.functional.mse_loss),
        (nn.LSTM(4, 4), (X[:, None], X[:, None]), last_of),
        (torch.compile(nn.Linear(4, 4), backend="eager"), (X, X), nn.functional.mse_loss),
    ],
    ids=["mapping", "keywords and targets", "dataclass", "positional", "batch norm", "lstm", "compiled"],
)
def test_any_batch_that_a_model_takes_is_measured(model: nn.Module, batch: Any, loss: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    found = compare_phases(model, batch, loss=loss, repeats=5, warmup=1)
    assert {row.conditions["batch"] for row in found.rows} == {8}
    assert {row.conditions["model"] for row in found.rows} == {type(model).__name__}
    assert all((found.time("training", phase).value or 0) > 0 for phase in ("forward", "backward", "optimizer"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


OPTIMIZERS = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("name", [*OPTIMIZERS, "Muon"])
def test_every_optimizer_of_torch_is_measured(name: str) -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = getattr(torch.optim, name)(model.parameters())
    before = str(optimizer.state_dict())
    found = compare_phases(model, (X, X), optimizer=optimizer, loss=nn.functional.mse_loss, repeats=5, warmup=1)
    assert (found.time("training", "optimizer").value or 0) > 0
    assert str(optimizer.state_dict()) == before


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    with pytest.raises(BadInput, match="sparse"):
        compare_phases(model, (IDS, torch.randn(8, 6, 4)), optimizer=optimizer, loss=nn.functional.mse_loss, repeats=5)


def frozen_linear() -> nn.Module:
    return nn.Linear(4, 4).requires_grad_(False)


def root_of_nothing(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output * 0).sqrt().sum()  # 0, whose gradient is 0 times infinity


@pytest.mark.parametrize(
    ("model", "batch", "how", "said"),
    [
        (nn.Linear(4, 4), (X * float("nan"), X), {}, "loss of this batch is nan"),
        (nn.Linear(4, 4), (X, X), {"loss": root_of_nothing}, "gradient of (weight|bias) is not finite"),
        (nn.Linear(4, 4), (X, X), {"loss": nn.MSELoss(reduction="none")}, r"shape \(8, 4\), and a step needs one"),
        (nn.Linear(4, 4), (X, X), {"loss": lambda out, y: 1.0}, "a float, and a step needs one number"),
        (frozen_linear(), (X, X), {}, "no parameter that is trained"),
        (Labelled(), {"input_ids": IDS}, {"loss": None}, "gives no loss of its own"),
        (Labelled(), {"input_ids": IDS, "labels": IDS * 0 - 100}, {"loss": None}, "loss of this batch is nan"),
        (nn.Linear(5, 4), (X, X), {}, "batch: the model fails on these inputs: RuntimeError: mat1 and mat2"),
        (
            nn.Linear(4, 5),
            (X, X),
            {"loss": lambda out, y: (out - y).sum()},
            "batch: the loss fails on what the model gives",
        ),
        (nn.Linear(4, 4), "text", {}, "no tensor is in its inputs, a str"),
        (nn.Linear(4, 4), (X, X), {"optimizer": "LBFGS"}, "LBFGS runs forward and backward within its own step"),
    ],
)
def test_what_no_step_can_be_taken_on_is_refused(model: nn.Module, batch: Any, how: Any, said: str) -> None:
    if "optimizer" in how:
        how = {"optimizer": torch.optim.LBFGS(model.parameters())}
    with pytest.raises(BadInput, match=said):
        compare_phases(model, batch, repeats=5, **({"loss": nn.functional.mse_loss} | how))


def test_logits_of_one_position_have_a_target_each() -> None:
    """Case 26 of what people bring: (B, V)."""
    assert compare_phases(nn.Linear(4, 3), (X, torch.randint(3, (8,))), repeats=5, warmup=1).rows


def test_the_public_names_are_few_and_documented() -> None:
    assert len(isoforward.__all__) <= 13
    assert all(getattr(isoforward, name).__doc__ for name in isoforward.__all__)
    assert set(isoforward.__all__) <= set(dir(isoforward))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = isoforward.nonsense


def test_importing_the_package_imports_nothing_beyond_python() -> None:
    script = "import sys, isoforward; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "rich", "hydra", "safetensors"}.isdisjoint(done.stdout.split())
