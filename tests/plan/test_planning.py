"""Plans against published memory, hand counts, and what a change must do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.datasheets import TABLE
from isoforward.base.errors import BadInput
from isoforward.model import cost, footprint
from isoforward.plan.efficiency import share
from isoforward.plan.planning import KERNELS_BYTES, MEMORY_ERROR, OnPaper, Plan, changes, peak
from isoforward.plan.published import MODELS
from isoforward.plan.subject import Known, Serving, Setup

LORA = AdapterConfig(name="lora")
GPT2 = replace(MODELS["gpt2"], context=1024)


def planned(model: ModelConfig = GPT2, hardware: str = "h100", serving: Serving | None = None, **setup: Any) -> Plan:
    made = Setup(**{"batch": 8, "length": 1024} | setup)
    where = TABLE[hardware]
    serving = serving or Serving(prompt=500, new_tokens=100)
    return Plan(subject=Known(model), hardware=where, setup=made, serving=serving, clock=OnPaper(hardware=where))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("checkpointing", cost.CHECKPOINTING)
def test_one_device_holds_what_the_footprint_says(accumulate: int, checkpointing: str) -> None:
    plan = planned(accumulate=accumulate, checkpointing=checkpointing)
    expected = footprint.training_peaks(
        GPT2,
        batch=8 // accumulate,
        length=1024,
        dtype="bf16",
        accumulate=accumulate,
        checkpointing=checkpointing,
        fused_norm=True,
    )
    assert plan.training_bytes(plan.setup) == expected


def test_the_optimizer_phase_of_zero_3_holds_a_share_of_the_state() -> None:
    """Rajbhandari 2020, table 1: 16 bytes a parameter over the ways; and what is gathered on top."""
    plan = planned(devices=8, strategy="fsdp")
    state = 16 * cost.parameters(GPT2).total / 8
    gathered = 4 * (50257 * 768 + 2 * cost.layer_parameters(GPT2))
    assert plan.training_bytes(plan.setup)["optimizer"] == pytest.approx(state + gathered, rel=1e-6)


def test_a_step_takes_its_flops_at_the_share_that_others_reached() -> None:
    plan = planned(MODELS["llama3-8b"], batch=16, length=8192)
    reached = share("training", "h100")
    model = MODELS["llama3-8b"]
    flops = cost.forward_flops(model, batch=16, length=8192).total
    flops += cost.backward_flops(model, batch=16, length=8192, convention="hardware").total
    step = plan.clock.step(plan.subject, plan.setup)
    assert step.value == pytest.approx(flops / (reached.value * 989.5e12))
    assert (step.low, step.high) == (step.value * reached.low, step.value * reached.high)


def test_decode_reads_weights_once_and_every_cache() -> None:
    plan = planned(MODELS["llama2-7b"], "a100", Serving(users=1, prompt=5, new_tokens=200))
    decode = plan.clock.decode(plan.subject, plan.serving, 1)
    assert decode.low < 1 / 104.9 < decode.high  # gpt-fast's README


def test_an_interval_is_wholly_inside_the_memory_or_it_is_uncertain() -> None:
    plan = planned()
    memory = plan.hardware.memory_bytes
    for factor, said in ((0.5, "yes"), (1.0, "uncertain"), (2.0, "no")):
        assert plan.fits(peak(factor * memory)) == said
    assert plan.fits(peak((memory - KERNELS_BYTES) / (1 + MEMORY_ERROR) * 0.999)) == "yes"
    assert plan.fits(peak((memory - KERNELS_BYTES) / (1 + MEMORY_ERROR) * 1.001)) == "uncertain"


def test_remedies_fit_keep_the_tokens_and_come_cheapest_first() -> None:
    plan = planned(batch=480, hardware="rtx_4090")
    assert plan.fits(plan.training_peak(plan.setup)) == "no"
    found = plan.remedies()
    assert found[0].changes == {"accumulate": 15}
    assert [remedy.order for remedy in found] == sorted(remedy.order for remedy in found)
    for remedy in found:
        assert plan.fits(plan.training_peak(remedy.setup)) == "yes"
        assert remedy.setup.tokens == plan.setup.tokens
        assert changes(plan.setup, remedy.setup) == remedy.changes
    less = replace(found[0].setup, accumulate=12)  # the divisor of 480 before it
    assert plan.fits(plan.training_peak(less)) != "yes"


def test_where_one_sequence_alone_is_too_large_checkpointing_is_offered_with_its_cost() -> None:
    long = replace(GPT2, layers=24, width=1024, heads=16, context=32768)
    remedy = planned(long, "rtx_4090", batch=1, length=32768).remedies()[0]
    assert remedy.changes == {"checkpointing": "full"}
    assert 1.2 < remedy.cost < 4 / 3  # one forward more, of a step of three: Narayanan 2021, equation 4


def test_an_adapter_leaves_the_frozen_weights_their_four_bytes_and_little_else() -> None:
    """Hu 2021, section 4.2: no gradients and no states of what is frozen."""
    plan = planned(MODELS["llama3-8b"], batch=1, length=512, precision="fp32", adapter=LORA)
    held = plan.subject.training(plan.setup, fused_norm=True)["optimizer"]
    count = 8030261248
    assert held["weights"] == pytest.approx(4 * count, rel=0.01)
    assert held["gradients"] + held["optimizer"] < 0.02 * 12 * count
    full, adapted = (plan.subject.step(replace(plan.setup, adapter=name)).flops for name in (AdapterConfig(), LORA))
    assert 0.6 < adapted / full < 0.72  # two thirds, and the adapter's own


def test_an_adapter_is_offered_where_the_state_of_all_weights_is_too_much() -> None:
    plan = planned(MODELS["llama3-8b"], batch=1, length=512)
    found = [remedy.changes for remedy in plan.remedies()]
    assert {"adapter": "lora"} in found
    with pytest.raises(BadInput, match="write strategy=ddp"):
        Setup(adapter=LORA, strategy="fsdp")


def test_users_at_most_fit_and_one_more_does_not() -> None:
    plan = planned(MODELS["llama3-8b"], serving=Serving(users=32, prompt=1000, new_tokens=250))
    most = plan.users_at_most()
    assert most > 32
    for users, fits in ((most, True), (most + 1, False)):
        held = plan.subject.serving_bytes(replace(plan.serving, users=users))["decode"]
        assert (peak(held).high <= plan.hardware.memory_bytes) == fits


def test_a_batch_that_cannot_be_cut_says_which_can() -> None:
    with pytest.raises(BadInput, match="write batch=12"):
        Setup(batch=10, accumulate=2, devices=3)


def test_planning_one_of_our_families_loads_no_torch() -> None:
    code = "import sys, isoforward.plan.planning, isoforward.plan.published; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
