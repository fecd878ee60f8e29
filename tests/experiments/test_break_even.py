"""Hand counts, published figures, and streams whose mean and spread are known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import break_even
from experiments.break_even import BreakEven, main
from isoforward.app.command_line import run
from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import lookup
from isoforward.base.errors import BadInput
from isoforward.base.results import Row, only, read, select
from isoforward.plan.economics import break_even_tokens
from isoforward.plan.lifetime import Plan, lengths, plan, simulated_days

LLAMA2_7B = ModelConfig(
    family="llama", layers=32, heads=32, width=4096, ffn=11008, context=4096, vocab=32000, tied=False
)
LLAMA3_8B = ModelConfig(
    family="llama",
    layers=32,
    heads=32,
    kv_heads=8,
    width=4096,
    ffn=14336,
    context=8192,
    vocab=128256,
    tied=False,
)
H100, A100 = {"hardware": "h100"}, {"hardware": "a100"}


def planned(model: ModelConfig = LLAMA3_8B, **asked: Any) -> Plan:
    config = BreakEven(model=model, **asked)
    return plan(config, lookup(config.hardware))


def told(made: Plan) -> tuple[Row, ...]:
    return tuple(break_even.rows(made))


def value(rows: tuple[Row, ...], **wanted: object) -> float:
    row = only(rows, **wanted)
    assert row is not None
    assert row.value is not None
    return row.value


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10**15), st.integers(1, 4096), st.integers(1, 4096))
def test_by_6nd_and_2n_serving_overtakes_training_at_exactly_three_times_the_tokens(
    tokens: int, prompt: int, new: int
) -> None:
    made = planned(tokens=tokens, prompt=prompt, new_tokens=new, decode_batch=1)
    bill, each = (costs["FLOPs, 6ND/2N"] for costs in (made.training(), made.request(prompt, new)))
    assert break_even_tokens(bill * (prompt + new), each) == 3 * tokens


def test_the_row_of_6nd_and_2n_is_exactly_three_times_the_tokens_trained_on() -> None:
    rows = told(planned(tokens=15e12))
    assert value(rows, quantity="break-even", cost="FLOPs, 6ND/2N") == 45e12
    assert value(rows, quantity="days until break-even", cost="FLOPs, 6ND/2N", stream="closed form") == 36_000


def test_a_trained_token_of_llama3_8b_costs_what_a_hand_counts() -> None:
    """6 a weight that is multiplied, and 12LCT of attention (PaLM, appendix B)."""
    layer = 4096 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 14336
    weights = 32 * layer + 128256 * 4096
    made = planned(training_length=8192)
    assert made.trained_token_flops == 6 * weights + 12 * 32 * 4096 * 8192
    assert made.trained_token_s == pytest.approx(made.trained_token_flops / (0.4 * 989.5e12))


def test_a_token_decoded_alone_on_an_a100_takes_27_times_as_long_as_a_trained_one_at_a_third_of_the_flops() -> None:
    """2N bytes over 75 % of 2.039 TB/s, against 6N FLOPs over 40 % of 312 TFLOP/s."""
    rows = told(planned(LLAMA2_7B, **A100, prompt=1, new_tokens=2, training_length=128, decode_batch=1))
    by_hand = (2 / (0.75 * 2.039e12)) / (6 / (0.4 * 312e12))
    assert value(rows, compared="time", counted="6ND and 2N") == pytest.approx(by_hand)
    assert by_hand == pytest.approx(27.2, abs=0.05)
    assert value(rows, compared="FLOPs", counted="6ND and 2N") == pytest.approx(1 / 3)
    # with short texts the exact count differs by the table of 131 M weights that is looked up, not multiplied
    assert value(rows, compared="time", counted="exact") == pytest.approx(27.2, rel=0.03)
    assert value(rows, compared="FLOPs", counted="exact") == pytest.approx(1 / 3, rel=0.01)


@pytest.mark.parametrize("hardware", ["a100", "h100", "l4", "mi300x"])
def test_from_the_equal_batch_on_a_decoded_token_costs_no_more_time_than_a_trained_one(hardware: str) -> None:
    made = planned(hardware=hardware, prompt=100, new_tokens=20)
    batch = made.equal_batch()
    assert batch is not None
    assert made.decoded_token_s(made.midway, batch) <= made.trained_token_s
    assert made.decoded_token_s(made.midway, batch - 1) > made.trained_token_s


def test_where_keys_and_values_alone_take_longer_no_batch_is_told() -> None:
    """Llama-2-7B caches 524288 bytes a token: 4000 of them take 1.4 ms, a trained token 0.4 ms."""
    rows = told(planned(LLAMA2_7B, **A100, prompt=3900, new_tokens=100, decode_batch=1))
    batch = only(rows, quantity="batch as costly as training")
    assert batch is not None
    assert batch.provenance == "unavailable"


def test_a_request_takes_its_prompt_and_every_step_of_its_answer() -> None:
    made = planned(decode_batch=8)
    steps = sum(made.decoded_token_s(cached, 8) for cached in range(300, 300 + 39))
    assert made.request_s(300, 40) == pytest.approx(made.request_s(300, 1) + steps)


def test_money_is_hours_times_the_price_of_each_side_and_energy_is_time_at_tdp() -> None:
    rows = told(planned(tokens=1e12, price_per_hour=2.5, training_price_per_hour=1.5))
    for life, price in (("training", 1.5), ("inference", 2.5)):
        time_s, money, energy = (value(rows, life=life, per="token", quantity=q) for q in ("time", "money", "energy"))
        assert money == pytest.approx(time_s / 3600 * price)
        assert energy == pytest.approx(time_s * 700)  # H100 datasheet
    assert {row.provenance for row in select(rows, quantity="energy")} == {"estimated"}
    dearer = value(rows, quantity="break-even", cost="money") / value(rows, quantity="break-even", cost="device time")
    assert dearer == pytest.approx(1.5 / 2.5)


def test_idle_devices_make_a_served_token_dearer_in_time_and_not_in_flops() -> None:
    whole, half = (planned(busy=busy).request(100, 10) for busy in (1.0, 0.5))
    assert half["device time"] == pytest.approx(2 * whole["device time"])
    assert half["FLOPs, exact"] == whole["FLOPs, exact"]


def test_half_the_mfu_of_training_is_twice_its_time_and_twice_the_tokens_to_break_even() -> None:
    whole, half = (told(planned(training_mfu=mfu)) for mfu in (0.4, 0.2))
    for wanted in (
        {"quantity": "time", "life": "training", "per": "token"},
        {"quantity": "break-even", "cost": "device time"},
    ):
        assert value(half, **wanted) == pytest.approx(2 * value(whole, **wanted))


def test_tokens_are_20_a_parameter_unless_given() -> None:
    assert planned().tokens == 20 * 8_030_261_248  # Llama 3 8B, as published


def test_without_a_price_money_is_unavailable() -> None:
    row = only(told(planned()), quantity="break-even", cost="money")
    assert row is not None
    assert row.provenance == "unavailable"
    assert row.reason is not None
    assert "price_per_hour" in row.reason


def test_lifetimes_meet_at_the_break_even() -> None:
    rows = told(planned(price_per_hour=2.5))
    for cost in ("FLOPs, exact", "device time", "energy at TDP", "money"):
        at = value(rows, quantity="break-even", cost=cost)
        spent = [value(rows, cost=cost, life=life, served_tokens=at) for life in ("training", "inference")]
        assert spent[0] == spent[1]
        each = value(rows, cost=cost, life="inference", per="token")
        assert spent[1] == pytest.approx(each * at)


def test_every_row_is_predicted_and_names_its_hardware_and_assumptions() -> None:
    for row in told(planned(price_per_hour=2.5)):
        assert row.provenance in ("predicted", "estimated")
        assert row.conditions["hardware"] == "NVIDIA H100 SXM5 80GB"
        assert row.conditions["peaks"] == "looked up"
        assert row.conditions["training_mfu"] == 0.4
        assert row.conditions["decode_mbu"] == 0.75


# The stream


def test_arrivals_are_poisson() -> None:
    """Of ten requests at one a day, the tenth comes after a Gamma(10): 10 days, with a variance of 10."""
    days = [simulated_days(10.0, np.ones(4), 1.0, np.random.default_rng(seed)) for seed in range(600)]
    assert np.mean(days) == pytest.approx(10, rel=0.05)
    assert np.var(days) == pytest.approx(10, rel=0.2)


def test_a_long_stream_of_like_requests_takes_what_the_closed_form_says() -> None:
    days = simulated_days(1e12, np.full(1000, 10.0), 1e6, np.random.default_rng(1))
    assert days == pytest.approx(1e12 / 10 / 1e6, rel=1e-3)


def test_dear_requests_count_by_their_share() -> None:
    """One kind in four costs 13, the others 1: 4 a request."""
    days = simulated_days(4e6, np.array([13.0, 1.0, 1.0, 1.0]), 100.0, np.random.default_rng(1))
    assert days == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_lengths_have_the_mean_and_the_spread_that_were_asked_for(spread: float) -> None:
    drawn = lengths(1000, spread, np.arange(10_000))
    assert drawn.mean() == pytest.approx(1000, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(spread, rel=0.05)


def test_a_stream_without_spread_agrees_with_the_closed_form() -> None:
    rows = told(planned(spread=0.0))
    for cost in ("FLOPs, exact", "device time"):
        closed, drawn = (value(rows, cost=cost, stream=how) for how in ("closed form", "simulated"))
        assert drawn == pytest.approx(closed, rel=1e-3)


def test_the_same_seed_gives_the_same_days() -> None:
    one, same, other = (
        value(told(planned(requests_per_day=10, tokens=1e6, seed=seed)), cost="device time", stream="simulated")
        for seed in (1, 1, 2)
    )
    assert one == same != other


# Memory and bad input


def test_a_model_that_does_not_fit_says_how_many_devices_it_needs() -> None:
    """Llama-2-7B: 13.48 GB of weights and 32 caches of 4096 tokens, 2.1 GB each, are 82.2 GB."""
    asked: dict[str, Any] = {"prompt": 4000, "new_tokens": 96, "decode_batch": 32}
    with pytest.raises(BadInput, match=r"devices=1: serving needs .* GiB.*KV cache.*write devices=2"):
        planned(LLAMA2_7B, **A100, **asked)
    assert planned(LLAMA2_7B, **A100, **asked, devices=2)
    assert planned(LLAMA2_7B, **A100, **{**asked, "decode_batch": 30})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("hardware=h1000", "hardware=h1000 is not known: did you mean h100"),
        ("hardware=here", "experiments/calibrate.py"),
        ("hardware=nowhere.json", "hardware=nowhere.json is not a file"),
        ("hardware=t4", "write precision=fp32"),
        ("price_per_hour=0", "price_per_hour=0.0 must be positive"),
        ("training_price_per_hour=-1", "training_price_per_hour=-1.0 must be positive"),
        ("tokens=-1", "tokens=-1.0 must lie between"),
        ("tokens=nan", "tokens=nan"),
        ("requests_per_day=0", "requests_per_day=0.0 must lie between"),
        ("training_mfu=0", "training_mfu=0.0 must be a share"),
        ("training_mfu=1.2", "training_mfu=1.2 must be a share"),
        ("prefill_mfu=nan", "prefill_mfu=nan must be a share"),
        ("decode_mbu=-0.5", "decode_mbu=-0.5 must be a share"),
        ("busy=2", "busy=2.0 must be a share"),
        ("decode_batch=0", "decode_batch=0 must be"),
        ("prompt=many", "prompt: Value 'many'"),
        ("prompt=9000", "prompt + new_tokens=9250 is longer than the model's context of 8192"),
        ("training_length=9000", "training_length=9000 is longer"),
        ("model=llama3_405b", "devices=1: serving needs"),
        ("model=tiny", "is longer than the model's context of 256"),
        ("token=1", "token: no such key; did you mean tokens?"),
    ],
)
def test_a_mistake_is_told_in_one_message_and_nothing_is_written(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where no calibration is
    assert run(main, BreakEven, [override]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert said in complaint
    assert len(complaint.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


# The command


def test_neither_the_question_nor_its_prediction_loads_torch() -> None:
    script = (
        "import sys; from experiments.break_even import *; from isoforward.base.config import ModelConfig; "
        "asked = BreakEven(model=ModelConfig(vocab=99), prompt=9, new_tokens=9); "
        "list(rows(plan(asked, lookup('h100')))); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout == "False\n"


def test_the_command_answers_in_80_columns_and_leaves_rows_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["model=llama3_405b", "devices=16", "tokens=15.6e12", "price_per_hour=2.5", "requests_per_day=1e7"]
    assert run(main, BreakEven, [*asked, "tracking=none", "run_dir=asked"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "Serving overtakes training at so many served tokens: 46.8 T" in shown
    assert (tmp_path / "asked" / "report.html").is_file()
    results = read(tmp_path / "asked" / "results.jsonl")
    assert value(results.rows, quantity="break-even", cost="FLOPs, 6ND/2N") == 46.8e12
    assert not results.verdicts[0].trusted
    assert {row.environment for row in results.rows} == set(results.environments)
