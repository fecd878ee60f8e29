import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isoforward.base.config import ModelConfig, OptimConfig
from isoforward.model.gpt import GPT
from isoforward.model.optim import build, learning_rate, orthogonal, set_learning_rate
from isoforward.model.steps import train_step
from tests.conftest import lively, tiny

NAMES = ["adamw", "adam", "sgd", "muon"]


def steps(model: Any, optimizer: Any, tokens: torch.Tensor, count: Any = 1) -> None:
    for _ in range(count):
        train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:])


def with_gradients(config: ModelConfig, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(5)
    model = lively(GPT(config, dtype=dtype))
    model(tokens).float().square().mean().backward()
    return model


def named_groups(model: Any, optimizer: Any) -> Any:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_group_tied_ones_too(config: ModelConfig, name: str) -> None:
    model = GPT(config)
    groups = named_groups(model, build(model, OptimConfig(name=name)))
    listed = sorted(name for group in groups for name in group)
    assert listed == sorted(name for name, _ in model.named_parameters())
    assert ("unembedding.weight" in listed) is not config.tied


@pytest.mark.parametrize("name", NAMES)
def test_the_matrices_of_the_blocks_decay_and_nothing_else(name: str) -> None:
    model = GPT(tiny())
    optimizer = build(model, OptimConfig(name=name, weight_decay=0.3))
    decaying = set()
    for names, group in zip(named_groups(model, optimizer), optimizer.param_groups, strict=True):
        if group["weight_decay"]:
            assert group["weight_decay"] == 0.3
            decaying |= names
    inside = ["attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight"]
    assert decaying == {f"blocks.{layer}.{name}" for layer in range(2) for name in inside}


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_goes_on_with_the_same_bits(config: ModelConfig, tokens: torch.Tensor, name: str) -> None:
    model = GPT(config)
    optimizer = build(model, OptimConfig(name=name))
    steps(model, optimizer, tokens, 2)
    restored = copy.deepcopy(model)
    its_optimizer = build(restored, OptimConfig(name=name))
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, tokens, 2)
    steps(restored, its_optimizer, tokens, 2)
    for (name, left), right in zip(model.named_parameters(), restored.parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    ("name", "unfused"),
    [
        ("adamw", lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)),
        ("adam", lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95), foreach=False)),
        ("sgd", lambda groups: torch.optim.SGD(groups, momentum=0.95, nesterov=True, foreach=False)),
    ],
)
def test_the_fused_update_is_the_plain_one(name: str, unfused: Any) -> None:
    """On gradients that are given: those of a key's bias are rounding noise, which Adam would blow up."""
    model = GPT(tiny())
    plain = copy.deepcopy(model)
    matrices = [p for n, p in plain.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    others = [p for p in plain.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = build(model, OptimConfig(name=name, lr=1e-3, weight_decay=0.2))
    assert optimizer.defaults["fused"]
    plain_optimizer = unfused([group | {"lr": 1e-3} for group in groups])
    for _ in range(3):
        for left, right in zip(model.parameters(), plain.parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        optimizer.step()
        plain_optimizer.step()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_muons_rest_is_adamw(tokens: torch.Tensor) -> None:
    left, right = (with_gradients(tiny(), tokens) for _ in range(2))
    build(left, OptimConfig(name="muon")).step()
    build(right, OptimConfig(name="adamw")).step()
    for (name, ours), theirs in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(ours, theirs) is not (name.startswith("blocks.") and ours.dim() == 2), name


def newton_schulz(x: Any) -> Any:
    """What Jordan's quintic does to one singular value, five times over."""
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_newton_schulz_keeps_singular_vectors_and_brings_singular_values_near_one(shape: Any) -> None:
    left, _ = torch.linalg.qr(torch.randn(3, shape[0], 8, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(3, shape[1], 8, dtype=torch.float64))
    values = torch.linspace(0.1, 5, 8, dtype=torch.float64)
    found = orthogonal((left * values) @ right.mT, torch.float64)
    expected = newton_schulz(values / values.norm())
    torch.testing.assert_close(found, (left * expected) @ right.mT)
    assert 0.68 < expected.min() < expected.max() < 1.21


def test_each_fused_matrix_moves_by_the_learning_rate_in_every_direction(
    config: ModelConfig, tokens: torch.Tensor
) -> None:
    """Queries, keys, values, gate and up on their own, after taking the weights' decay away."""
    model = with_gradients(config, tokens)
    before = copy.deepcopy(model)
    build(model, OptimConfig(name="muon", muon_lr=0.5, weight_decay=0.1)).step()
    fused = {"attention.qkv": config.qkv_widths, "mlp.gate_up": [config.ffn_width] * 2}
    for (name, after), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if not (name.startswith("blocks.") and after.dim() == 2):
            continue
        moved = (old * (1 - 0.5 * 0.1) - after).detach() / 0.5
        rows = next((rows for part, rows in fused.items() if part in name), [len(moved)])
        for part, slope in zip(moved.split(rows), after.grad.split(rows), strict=True):
            gain = math.sqrt(max(1, part.shape[0] / part.shape[1]))
            values = torch.linalg.svdvals(slope)
            expected = newton_schulz(values / values.norm()) * gain
            found = torch.linalg.svdvals(part)
            torch.testing.assert_close(found, expected.sort(descending=True).values, rtol=1e-2, atol=1e-2)
            assert (part * slope).sum() > 0  # downhill


def test_an_unfused_matrix_moves_as_under_torchs_own_muon(tokens: torch.Tensor) -> None:
    """Which computes in bf16, as ours then does."""
    model = with_gradients(tiny(), tokens, torch.bfloat16)
    theirs = torch.nn.Parameter(model.blocks[0].mlp.up.weight.detach().clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    optimizer = build(model, OptimConfig(name="muon", muon_lr=0.02, weight_decay=0.1, momentum=0.95))
    start = theirs.detach().clone()
    for scale in (1.0, -0.3):
        ours = model.blocks[0].mlp.up.weight
        theirs.grad = ours.grad * scale + 0.01 * torch.ones_like(ours.grad) * ours.grad.std()
        ours.grad = theirs.grad.clone()
        optimizer.step()
        reference.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_one_batch_by_heart(tokens: torch.Tensor, name: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny())
    optimizer = build(model, OptimConfig(name=name, lr=0.1 if name == "sgd" else 3e-3))
    first, _ = train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:])
    steps(model, optimizer, tokens, 40)
    last, _ = train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:])
    assert abs(first - math.log(61)) < 0.2
    assert last < first / 2


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        # steps            0     1     2    4     6    8     10
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.882842712, 0.6, 0.317157288, 0.2]),
    ],
)
def test_the_schedule_has_the_values_worked_out_by_hand(schedule: Any, shares: Any) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=2, min_lr=0.2)
    assert [learning_rate(step, config, 11) for step in (0, 1, 2, 4, 6, 8, 10)] == pytest.approx(shares)


@given(
    st.integers(0, 300),
    st.integers(1, 200),
    st.integers(0, 250),
    st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "constant"]),
)
def test_a_share_lies_between_nothing_and_all_whatever_the_lengths(
    step: Any, max_steps: Any, warmup: Any, least: Any, schedule: Any
) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, min_lr=least)
    share = learning_rate(step, config, max_steps)
    assert 0 <= share <= 1 + 1e-12
    if step >= warmup:
        assert share >= least - 1e-12


def test_every_group_follows_the_schedule_from_its_own_peak() -> None:
    model = GPT(tiny())
    optimizer = build(model, OptimConfig(name="muon", lr=1e-3, muon_lr=0.04))
    for share in (0.5, 0.25):
        set_learning_rate(optimizer, share)
        found = {"rows" in group: group["lr"] for group in optimizer.param_groups}
        assert found == pytest.approx({True: 0.04 * share, False: 1e-3 * share})
