"""The command as typed: what it says, what it refuses, and that it allocates and loads nothing before it answers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.plan import PlanConfig, main, plan_of, rows
from isoforward.app.command_line import run
from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import TABLE, save
from isoforward.base.results import only, read, select
from isoforward.plan.published import MODELS
from isoforward.plan.subject import NotCounted

ROOT = Path(__file__).parents[2]
LLAMA = MODELS["llama3-70b"]


def asked(tmp_path: Path, *overrides: str) -> int:
    return run(main, PlanConfig, [*overrides, "tracking=none", f"run_dir={tmp_path / 'run'}"])


def test_a_preset_is_planned_on_one_screen_of_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert asked(tmp_path, "model=llama3_8b", "batch=64", "tokens=1e9", "price_per_hour=2.5") == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 80
    assert len(shown.splitlines()) < 45
    results = read(tmp_path / "run" / "results.jsonl")
    step, whole, paid = (
        only(results, life="training", quantity=quantity, per=per, change=None)
        for quantity, per in (("time", "step"), ("time", "run"), ("money", "run"))
    )
    assert whole.number == pytest.approx(step.number * 1e9 / (64 * 2048))
    assert paid.number == pytest.approx(whole.number / 3600 * 2.5)
    assert step.low is not None and step.high is not None
    assert step.low < step.number < step.high
    assert "makes it fit" in (tmp_path / "run" / "answer.txt").read_text()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_70b_is_planned_in_little_memory() -> None:
    """Its weights alone would be 141 GB."""
    code = "from experiments.plan import *; from isoforward.plan.published import MODELS; "
    code += "c = PlanConfig(model=MODELS['llama3-70b']); print(len(list(rows(plan_of(c), c))))"

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    path = f"{ROOT / 'src'}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=bounded, env={"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 10


def test_what_has_no_price_and_no_known_power_says_so(tmp_path: Path) -> None:
    hardware = tmp_path / "mine.json"
    save(hardware, replace(TABLE["l4"], name="Mine", tdp_w=None))
    config = PlanConfig(model=MODELS["gpt2"], length=512, hardware=str(hardware), batch=2)
    found = list(rows(plan_of(config), config))
    assert only(found, quantity="money").reason == "no price is known: write price_per_hour="
    assert not select(found, quantity="energy")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=gpt2", "length=2000"], "length=2000 is longer than the model's context of 1024"),
        (["model=gpt2", "prompt=1000", "new_tokens=100"], "prompt + new_tokens=1100 is longer"),
        (["batch=10", "devices=3"], "write batch=9"),
        (["precision=bf16", "hardware=v100"], "rate of NVIDIA V100 SXM2 32GB is not known; write precision=fp32"),
        (["optimizer=adamx"], "did you mean adam"),
        (["strategy=fspd"], "did you mean fsdp"),
        (["tokens=0"], "tokens"),
        (["adapter=lora", "adapter.targets=[zz]"], "adapter.targets: 'zz' matches nothing"),
        (["price_per_hour=-1"], "price_per_hour=-1"),
        (["hardware=h1000"], "did you mean h100"),
        (["bach=4"], "did you mean batch"),
        (["model=hf", "model.path=nowhere"], "holds no config.json"),
        (["model=transformers", "model.path=nowhere"], "holds no config.json"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert asked(tmp_path, *overrides) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_a_config_without_weights_is_enough_and_contradictions_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
    keys |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(keys | {"max_position_embeddings": 8192}))
    config = PlanConfig(model=ModelConfig(source="hf", path=str(file)))
    assert plan_of(config).subject.parameters == 8_030_261_248
    file.write_text(json.dumps(keys | {"max_position_embeddings": 8192, "num_attention_heads": 30}))
    assert asked(tmp_path, "model=hf", f"model.path={file}") == 2
    assert "heads" in capsys.readouterr().err


def test_what_cannot_be_counted_is_unavailable_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PlanConfig(model=MODELS["gpt2"], length=512)
    plan = plan_of(config)

    def refuse(*_: object, **__: object) -> None:
        raise NotCounted("training cannot be counted without data: it asks which experts")

    monkeypatch.setattr(type(plan.subject), "training", refuse)
    found = list(rows(plan, config))
    assert "which experts" in str(only(found, life="training").reason)
    assert select(found, life="inference", quantity="time")


def test_the_changes_that_make_it_fit_are_told_whole_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked(tmp_path, "model=llama3_70b", "batch=64")
    shown = capsys.readouterr().out
    assert "what makes training fit" in shown and "strategy=fsdp" in shown
    assert "…" not in shown


def test_what_nothing_makes_fit_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked(tmp_path, "model=llama3_405b", "batch=8", "devices=8")
    shown = " ".join(capsys.readouterr().out.split())
    assert "nothing makes training fit on the devices that batch=8 can be shared by" in shown
    assert "not one user fits" in shown and "at most 0" not in shown
    answer = (tmp_path / "run" / "answer.txt").read_text()
    assert "nothing makes training fit" in answer


def test_users_are_counted_in_whole_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked(tmp_path, "model=gpt2", "length=512")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "users that fit" in line)
    most = only(read(tmp_path / "run" / "results.jsonl"), quantity="users that fit").number
    assert line.split()[-1] == f"{most:,.0f}"


def test_a_plan_says_which_state_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Case: one config.json, planned as a family of ours and as any model of Transformers, twice apart."""
    pytest.importorskip("transformers")
    keys: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 200}
    keys |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(keys | {"max_position_embeddings": 128}))
    for source, dtype in (("hf", "fp32"), ("transformers", "bf16")):
        assert asked(tmp_path / source, f"model={source}", f"model.path={tmp_path}") == 0
        assert f"weights, gradients and optimizer state in {dtype}" in capsys.readouterr().out
        assert f"(weights and optimizer state in {dtype})" in (tmp_path / source / "run" / "answer.txt").read_text()
