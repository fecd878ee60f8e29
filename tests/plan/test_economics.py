"""Published figures, each with its source, and hand counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.model import cost
from isoforward.plan import economics

H100, A100, A100_BYTES = 989.5e12, 312e12, 2.039e12


@pytest.mark.parametrize(
    ("source", "parameters", "tokens", "expected"),
    [
        ("GPT-3 paper, appendix D: 175B", 174600e6, 3e11, 3.14e23),
        ("GPT-3 paper, appendix D: small", 125e6, 3e11, 2.25e20),
        ("GPT-3 paper, appendix D: 13B", 12850e6, 3e11, 2.31e22),
        ("Llama 3 paper, section 3.2: 405B", 405e9, 15.6e12, 3.8e25),
    ],
)
def test_training_flops_are_6nd(source: str, parameters: float, tokens: float, expected: float) -> None:
    flops = economics.lifetime_flops(per_parameter_token=economics.TRAINED, parameter_count=parameters, tokens=tokens)
    assert flops == pytest.approx(expected, rel=0.003)


def test_gpt2_takes_nanogpts_days() -> None:
    """nanoGPT transformer_sizing.ipynb: 8 A100 at 30 %."""
    flops = economics.lifetime_flops(per_parameter_token=economics.TRAINED, parameter_count=124337664, tokens=3e11)
    assert economics.days(flops, flops_per_s=0.3 * A100, devices=8) == pytest.approx(3.46, rel=0.001)


@pytest.mark.parametrize(
    ("parameters", "tokens", "devices", "achieved", "days"),
    [(175e9, 3e11, 1024, 140e12, 34), (1008.0e9, 4.5e11, 3072, 163e12, 84)],
)
def test_megatrons_models_take_the_published_days(
    parameters: float, tokens: float, devices: int, achieved: float, days: float
) -> None:
    """Narayanan 2021, eq. 4 and section 5.1. 84 days follow from table 1's 1008.0B; a round 1e12 takes 83.2."""
    flops = economics.lifetime_flops(
        per_parameter_token=economics.TRAINED_RECOMPUTING, parameter_count=parameters, tokens=tokens
    )
    assert economics.days(flops, flops_per_s=achieved, devices=devices) == pytest.approx(days, rel=0.005)


@pytest.mark.parametrize(
    ("length", "tokens_per_s", "mfu", "hfu"), [(2048, 85144, 46.44, None), (65536, 15654, 28.59, 38.13)]
)
def test_mpt_7b_reaches_the_published_utilisation(
    length: int, tokens_per_s: float, mfu: float, hfu: float | None
) -> None:
    """llm-foundry benchmarking README: 8 H100; N with positions; recomputation counted as one more forward."""
    config = ModelConfig(layers=32, heads=32, width=4096, vocab=50368, context=length)
    step = length * (6 * cost.parameters(config).total + 12 * 32 * 4096 * length)  # PaLM, appendix B
    time_s = length / tokens_per_s
    percent = 100 * (economics.utilisation(step, time_s=time_s, peak_per_s=8 * H100) or 0)
    assert percent == pytest.approx(mfu, abs=0.02)
    if hfu is not None:
        assert percent * 4 / 3 == pytest.approx(hfu, abs=0.02)


def test_mfu_is_flops_achieved_over_the_peak() -> None:
    """nanoGPT transformer_sizing.ipynb: 100 sequences of 1024 in 0.755 s on an A100 are 37.14 %."""
    config = ModelConfig(layers=12, heads=12, width=768, vocab=50257, context=1024, bias=False)
    tokens_per_s = 100 * 1024 / 0.755
    model = economics.mfu(config, length=1024, tokens_per_s=tokens_per_s, peak_flops_per_s=A100)
    causal = economics.mfu(config, length=1024, tokens_per_s=tokens_per_s, peak_flops_per_s=A100, convention="causal")
    assert model == pytest.approx(0.3714, abs=5e-5)
    assert causal is not None
    assert causal < 0.3714


def test_an_unknown_peak_gives_no_utilisation_and_no_time() -> None:
    assert economics.utilisation(1e12, time_s=1.0, peak_per_s=None) is None
    assert economics.roofline_time_s(1e12, 1e9, flops_per_s=None, bytes_per_s=1e12) is None
    assert economics.roofline_time_s(1e12, 1e9, flops_per_s=1e12, bytes_per_s=None) is None


def test_the_roofline_bends_where_intensity_is_peak_over_bandwidth() -> None:
    """By hand, A100: 312e12 / 2.039e12 = 153 FLOPs a byte."""
    ridge = A100 / A100_BYTES
    for factor, bound in ((0.5, 1 / A100_BYTES), (2.0, 2.0 * ridge / A100)):
        flops = factor * ridge
        assert economics.intensity(flops, 1.0) == flops
        time_s = economics.roofline_time_s(flops, 1.0, flops_per_s=A100, bytes_per_s=A100_BYTES)
        assert time_s == pytest.approx(bound)


@pytest.mark.parametrize(("stage", "gb"), [(0, "120"), (1, "31.4"), (2, "16.6"), (3, "1.88")])
def test_zero_cuts_memory_as_published(stage: int, gb: str) -> None:
    """ZeRO (Rajbhandari 2020), figure 1 and table 1: 7.5B parameters, 2 + 2 + 12 bytes, 64 ways."""
    state = {"weights": 15 * 10**9, "gradients": 15 * 10**9, "optimizer": 90 * 10**9}
    held = economics.zero_bytes(state, ways=64, stage=stage) / 1e9
    digits = len(gb.partition(".")[2])
    assert f"{held + 1e-9:.{digits}f}" == gb


@pytest.mark.parametrize(("stage", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_zero_sends_what_is_published(stage: int, volume: int) -> None:
    """ZeRO (Rajbhandari 2020), section 7: 2 Psi up to ZeRO-2 and 3 Psi for ZeRO-3, (n-1)/n of it in a ring."""
    state = {"weights": 1000, "gradients": 1000, "optimizer": 6000}
    assert economics.zero_traffic(state, ways=4, stage=stage) == volume * 1000 * 3 / 4


@given(st.integers(1, 10**15), st.integers(1, 4096))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(size: int, ways: int) -> None:
    halves = sum(economics.collective_bytes(name, size, ways=ways) for name in ("reduce_scatter", "all_gather"))
    assert economics.collective_bytes("all_reduce", size, ways=ways) == pytest.approx(halves)


def test_one_device_has_nobody_to_send_to() -> None:
    assert economics.collective_bytes("all_reduce", 10**9, ways=1) == 0


@given(st.integers(10**6, 10**12), st.integers(1, 10**13))
def test_serving_overtakes_training_at_three_times_the_tokens(parameters: int, tokens: int) -> None:
    """6ND against 2N a served token."""
    training = economics.lifetime_flops(
        per_parameter_token=economics.TRAINED, parameter_count=parameters, tokens=tokens
    )
    served = economics.lifetime_flops(per_parameter_token=economics.SERVED, parameter_count=parameters, tokens=1)
    assert economics.break_even_tokens(training, served) == 3 * tokens


def test_a_token_decoded_alone_takes_27_times_as_long_as_one_trained_at_a_third_of_the_flops() -> None:
    """By hand, A100: 2N bytes over 75 % of 2.039 TB/s, against 6N FLOPs over 40 % of 312e12."""
    N = 7e9
    decoded = economics.roofline_time_s(2 * N, 2 * N, flops_per_s=A100, bytes_per_s=0.75 * A100_BYTES)
    trained = economics.roofline_time_s(6 * N, 0, flops_per_s=0.4 * A100, bytes_per_s=A100_BYTES)
    assert decoded is not None
    assert trained is not None
    assert decoded / trained == pytest.approx(27, rel=0.02)
    assert economics.SERVED / economics.TRAINED == 1 / 3


def test_money_is_hours_of_devices() -> None:
    assert economics.money(7200, price_per_hour=2.5, devices=8) == 40


def test_bad_input_is_named() -> None:
    with pytest.raises(BadInput, match="price_per_hour=0"):
        economics.money(1, price_per_hour=0)
    with pytest.raises(BadInput, match="tokens=-1"):
        economics.lifetime_flops(per_parameter_token=6, parameter_count=1e9, tokens=-1)
    with pytest.raises(BadInput, match="never overtakes"):
        economics.break_even_tokens(1e20, 0)
    with pytest.raises(BadInput, match="stage=4"):
        economics.zero_bytes({"weights": 1}, ways=2, stage=4)
    with pytest.raises(BadInput, match=r"collective=all_reduse.*did you mean all_reduce"):
        economics.collective_bytes("all_reduse", 1, ways=2)
    with pytest.raises(BadInput, match="flops_per_s=0"):
        economics.days(1e20, flops_per_s=0)
