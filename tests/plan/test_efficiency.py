"""The distribution of errors, recomputed from the rows of published.csv and hand-written formulas."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import pytest

from isoforward.base.datasheets import TABLE
from isoforward.model import cost
from isoforward.plan.efficiency import COVERED, WORKS, alike, errors, reached, share
from isoforward.plan.published import MODELS, SOURCES, published


def the(source: str, **wanted: object) -> float:
    found = [p for p in published() if p.source == source and all(getattr(p, k) == v for k, v in wanted.items())]
    assert len(found) == 1
    return reached(found[0])


def test_every_row_has_its_model_its_source_and_its_device() -> None:
    assert len(published()) > 200
    for one in published():
        assert one.model in MODELS
        assert one.source in SOURCES
        assert one.hardware in TABLE
        assert 0 < reached(one) < 1, one


@pytest.mark.parametrize(
    ("model", "parameters"),  # of llm-foundry's table, of Narayanan 2021 and of Meta's cards
    [("mpt-7b", 6658859008), ("mpt-70b", 64862437376), ("mpt-125m", 125311488), ("llama3-8b", 8030261248)],
)
def test_the_models_are_those_that_were_measured(model: str, parameters: int) -> None:
    assert cost.parameters(MODELS[model]).total == parameters


def test_llm_foundrys_own_utilisation_follows_from_its_tokens_a_second() -> None:
    """Its MFU of 46.44 % counts 6ND and 12LCT^2; ours leaves out norms and counts flash attention's fifth product."""
    assert the("llm-foundry", model="mpt-7b", hardware="h100", length=2048, devices=8) == pytest.approx(0.464, rel=0.03)
    recomputing = the("llm-foundry", model="mpt-7b", hardware="h100", length=65536, devices=8)
    assert recomputing == pytest.approx(0.3813, rel=0.15)  # its HFU, which leaves attention's fifth product out


def test_gpt_fasts_own_bandwidth_follows_from_its_tokens_a_second() -> None:
    assert the("gpt-fast", dtype="bf16", devices=1) * 2039e9 == pytest.approx(1397.31e9, rel=0.01)
    assert the("gpt-fast", dtype="int8", devices=1, model="llama2-70b") * 2039e9 == pytest.approx(1322.58e9, rel=0.01)
    assert the("gpt-fast", dtype="bf16", devices=2, model="llama2-70b") * 2039e9 == pytest.approx(1481.87e9, rel=0.02)


def test_megatrons_days_are_its_measured_rate() -> None:
    assert the("megatron", model="gpt3-175b") == pytest.approx(140 / 312, rel=0.1)


@pytest.mark.parametrize("work", WORKS)
def test_the_interval_is_that_of_predictions_from_the_other_sources(work: str) -> None:
    rows = alike(work)
    weighed: dict[float, float] = defaultdict(float)
    sources = {row.source for row in rows}
    for row in rows:
        others = [o for o in rows if o.source != row.source]
        pool = [o for o in others if o.hardware == row.hardware] or others
        expected = median(median(reached(o) for o in pool if o.source == source) for source in {o.source for o in pool})
        weighed[expected / reached(row)] += 1 / len(sources) / sum(row.source == o.source for o in rows)
    assert sorted({error for error, _ in errors(work)}) == pytest.approx(sorted(weighed))
    found = share(work, "h100")
    inside = sum(weight for error, weight in weighed.items() if found.low - 1e-9 <= error <= found.high + 1e-9)
    assert inside >= COVERED - 1e-9


def test_a_device_that_nobody_measured_takes_the_share_of_the_others() -> None:
    assert not share("training", None).known
    assert share("training", "a100").known
    assert all(0 < share(work, key).value < 0.95 for work in WORKS for key in (None, *TABLE))
