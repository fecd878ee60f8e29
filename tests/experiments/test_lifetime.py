"""The command as typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.lifetime import Lifetime, main
from isoforward.app.command_line import run
from isoforward.base.results import only, read


def asked(tmp_path: Path, *overrides: str) -> int:
    return run(main, Lifetime, [*overrides, "tracking=none", f"run_dir={tmp_path / 'run'}"])


def test_it_answers_in_flops_in_device_time_and_in_money(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(tmp_path, "like=13e9", "served=[2e12]", "price_per_hour=2", "training_price_per_hour=4") == 0
    results = read(tmp_path / "run" / "results.jsonl")
    flops, time, money = (
        only(results, quantity="cheapest size", counted=counted).number
        for counted in ("FLOPs, 6ND and 2N", "device time", "money")
    )
    assert flops == pytest.approx(7e9, rel=0.02)
    assert time < flops
    assert money >= time  # training is the dearer hour: fewer of them
    assert only(results, quantity="saved", counted="FLOPs, 6ND and 2N").number == pytest.approx(0.17, abs=0.01)
    assert "17% saved" in (tmp_path / "run" / "answer.txt").read_text()
    assert max(map(len, capsys.readouterr().out.replace(str(tmp_path), "").splitlines())) <= 80


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["like=1"], "like=1"),
        (["served=[]"], "write served=[1e12]"),
        (["served=[-1]"], "served=-1"),
        (["decode_mbu=1.5"], "decode_mbu=1.5 must be a share"),
        (["precision=bf16", "hardware=v100"], "the rate of NVIDIA V100 SXM2 32GB is not known"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert asked(tmp_path, *overrides) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
