"""The public interface: what it measures of any module, what it leaves untouched, and that importing it is free."""

import copy
import doctest
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import isoforward
from isoforward import compare_phases, read
from isoforward.app import any_module
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
