"""The commands as a user types them: processes of their own, a tiny model, real text."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isoforward.base.results import only, read
from isoforward.formats import checkpoint_file
from isoforward.serve.inference import load
from isoforward.show.compare import compare
from tests.loaded import loaded_python

ROOT = Path(__file__).parents[1]
TINY = [
    "model.layers=1",
    "model.heads=2",
    "model.width=32",
    "model.context=64",
    "data.length=32",
    "data.batch=4",
    "data.tokenizer=char",
    "trainer.checkpoint_every=2",
    "trainer.validate_every=4",
    "trainer.validation_batches=2",
    "tracking=none",
    "precision=fp32",
]
MEASURED = [*TINY, "measure=quick", "measure.budget=1", "measure.prompt=8"]


def start(script: str, *arguments: str, where: Path) -> subprocess.Popen[str]:
    """All of a session share a cache, beside their directories."""
    kept = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(where.parent / "cache"), "COLUMNS": "80"}
    environment = {**os.environ, **kept}
    command = [loaded_python(), str(ROOT / script), *arguments]
    return subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def command(script: str, *arguments: str, where: Path, code: int = 0) -> tuple[str, str]:
    process = start(script, *arguments, where=where)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    where = tmp_path_factory.mktemp("trained")
    out, _ = command("train.py", *MEASURED, "trainer.max_steps=8", where=where)
    return where, out


def test_training_leaves_one_directory_with_everything_in_it(trained: tuple[Path, str]) -> None:
    where, out = trained
    latest = where / "runs" / "latest"
    assert latest.is_symlink()
    held = {path.name for path in latest.iterdir()}
    assert {"config.yaml", "checkpoints", "export", "results.jsonl", "report.html"} <= held
    assert {path.name for path in (latest / "export").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "manifest.json",
    }
    card = (latest / "export" / "README.md").read_text()
    assert "Training this model costs" in card and "| training | backward |" in card and "validation loss" in card
    assert "What does training add to the forward pass" in out
    assert "bit for bit" in out
    assert max(map(len, out.partition("What does")[2].partition("rows  ")[0].splitlines())) <= 80


def test_the_rows_say_that_both_lives_ran_the_same_forward(trained: tuple[Path, str]) -> None:
    results = read(trained[0] / "runs" / "latest" / "results.jsonl")
    comparison = compare(results)
    assert comparison.adamw_flops_ratio == pytest.approx(3.0, abs=0.01)  # backward is twice forward (PaLM, appendix B)
    assert comparison.flops_ratio is not None and comparison.flops_ratio > 3.1  # Muon's update multiplies matrices
    assert {line.phase for line in comparison.training} == {"forward", "loss", "backward", "optimizer"}
    assert all(line.time and line.memory for line in [*comparison.training, *comparison.inference])
    assert len(results.environments) == 1


def test_the_report_opens_alone(trained: tuple[Path, str]) -> None:
    report = (trained[0] / "runs" / "latest" / "report.html").read_text(encoding="utf-8")
    assert "Training this model costs" in report
    assert len(report) < 1.5e6


@pytest.mark.parametrize(
    "checkpoint", ["runs/latest", "runs/latest/export", "runs/latest/checkpoints/last-000008.ckpt"]
)
def test_text_comes_from_every_kind_of_checkpoint(trained: tuple[Path, str], checkpoint: str) -> None:
    asked = [f"checkpoint={checkpoint}", "prompt=ROMEO:", "temperature=0", "max_new_tokens=12"]
    out, err = command("generate.py", *asked, where=trained[0])
    assert out == f"ROMEO:{load(trained[0] / 'runs' / 'latest').generate('ROMEO:', temperature=0, max_new_tokens=12)}\n"
    assert "TTFT" in err
    assert "tokens/s" in err


def test_explain_shows_every_forward_pass(trained: tuple[Path, str]) -> None:
    _, err = command("generate.py", "prompt=ROMEO:", "explain=true", "max_new_tokens=3", where=trained[0])
    lines = [line for line in err.splitlines() if " sees " in line]
    assert [line.split()[:4] for line in lines] == [
        ["1", "prefill", "sees", "6"],
        ["2", "decode", "sees", "7"],
        ["3", "decode", "sees", "8"],
    ]


def test_an_experiment_runs_on_the_trained_model(trained: tuple[Path, str]) -> None:
    asked = ["checkpoint=runs/latest", "data.length=32", "data.batch=2", "measure=quick", "measure.prompt=8"]
    out, _ = command("experiments/phase_costs.py", *asked, "tracking=none", "run_dir=runs/question", where=trained[0])
    assert "whole step" in out
    assert only(read(trained[0] / "runs" / "question" / "results.jsonl"), quantity="identity").value == 0


@pytest.mark.slow
def test_measuring_allocates_for_measure_context_whatever_the_model_could_do(tmp_path: Path) -> None:
    """Case 11 of what people bring: a cache for 524,288 positions alone would hold 2 GB."""
    asked = ["model=tiny_llama", "model.context=524288", "measure.context=64", "data.length=32", "data.batch=2"]
    few = ["measure=quick", "measure.repeats=5", "measure.processes=1", "tracking=none", "run_dir=run"]
    command("experiments/phase_costs.py", *asked, *few, where=tmp_path)
    rows = read(tmp_path / "run" / "results.jsonl").rows
    held = [row.number for row in rows if row.quantity == "memory" and row.value]
    assert held and max(held) < 2**28
    assert max(int(str(row.conditions.get("context", 0))) for row in rows if row.phase == "decode") <= 64


def test_training_again_gives_the_same_weights_and_measuring_changes_nothing(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    command("train.py", *TINY, "trainer.max_steps=8", "measure.enabled=false", "data.workers=2", where=tmp_path)
    manifests = [
        json.loads((where / "runs/latest/export/manifest.json").read_text()) for where in (trained[0], tmp_path)
    ]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]


def test_a_run_that_was_killed_goes_on_to_the_same_weights(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Killed once a checkpoint is there; what it resumes to is the uninterrupted run, bit for bit."""
    asked = [*TINY, "trainer.max_steps=8", "run_dir=runs/killed", "measure.enabled=false"]
    process = start("train.py", *asked, where=tmp_path)
    checkpoints = tmp_path / "runs" / "killed" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("last-*.ckpt")):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    command("train.py", *asked, "trainer.resume=auto", where=tmp_path)
    manifests = [
        json.loads((run / "export/manifest.json").read_text())
        for run in (trained[0] / "runs" / "latest", tmp_path / "runs" / "killed")
    ]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    states = [
        checkpoint_file.load(run / "checkpoints/last-000008.ckpt")
        for run in (trained[0] / "runs/latest", tmp_path / "runs/killed")
    ]
    torch.testing.assert_close(states[0]["optimizer_states"], states[1]["optimizer_states"], atol=0, rtol=0)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_the_weights_that_one_does(
    trained: tuple[Path, str], strategy: str, tmp_path: Path
) -> None:
    """Up to rounding: what one process sums over the batch, two sum over halves. One directory, written by rank 0."""
    asked = ["trainer.max_steps=8", "measure.enabled=false", "trainer.accelerator=cpu", "trainer.accumulate=2"]
    shared = ["trainer.devices=2", f"trainer.strategy={strategy}"]
    out, err = command("train.py", *TINY, *asked, *shared, where=tmp_path)
    assert len([path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]) == 1
    assert out.count("step     8") == 1
    assert "Error" not in err
    alone, together = (load(where / "runs/latest").model.state_dict() for where in (trained[0], tmp_path))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_does(tmp_path: Path) -> None:
    asked = [*TINY, "trainer.max_steps=8", "measure.enabled=false", "trainer.accelerator=cpu", "optim.clip=null"]
    asked += ["adapter=lora", "adapter.rank=4", "adapter.targets=[q,v]"]
    shared = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accumulate=2"]
    for run, more in (("alone", []), ("together", shared)):
        command("train.py", *asked, *more, f"run_dir=runs/{run}", where=tmp_path)
    alone, together = (
        load_file(tmp_path / "runs" / run / "adapter" / "adapter_model.safetensors") for run in ("alone", "together")
    )
    assert len(alone) == 4 and any(tensor.abs().max() > 1e-3 for name, tensor in alone.items() if "lora_B" in name)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(number: int, code: int, tmp_path: Path) -> None:
    process = start("train.py", *MEASURED, "trainer.max_steps=100000", "run_dir=runs/stopped", where=tmp_path)
    checkpoints = tmp_path / "runs" / "stopped" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("last-*.ckpt")):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "trainer.resume=runs/stopped" in err
    assert checkpoint_file.newest_good(checkpoints) is not None


@pytest.mark.parametrize(
    ("script", "arguments", "code", "said"),
    [
        ("train.py", ["optim.lrr=1"], 2, "did you mean optim.lr?"),
        ("train.py", ["data=text", "data.path=nothing.txt"], 2, "nothing.txt"),
        ("generate.py", ["checkpoint=nowhere"], 2, "checkpoint=nowhere does not exist"),
        ("experiments/phase_costs.py", ["checkpoint=nowhere"], 2, "checkpoint=nowhere does not exist"),
    ],
)
def test_bad_input_ends_with_one_message_and_leaves_nothing(
    script: str, arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    _, err = command(script, *arguments, where=tmp_path, code=code)
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_an_empty_or_too_short_corpus_is_refused_with_its_length(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("To be, or not to be")
    for name in ("empty.txt", "short.txt"):
        _, err = command("train.py", *MEASURED, "data=text", f"data.path={name}", where=tmp_path, code=2)
        assert err.startswith("error: ")
        assert not (tmp_path / "runs").exists()


def test_an_export_that_was_changed_is_refused_by_name(trained: tuple[Path, str], tmp_path: Path) -> None:
    export = trained[0] / "runs" / "latest" / "export"
    for path in export.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    _, err = command("generate.py", f"checkpoint={tmp_path}", "prompt=a", where=tmp_path, code=3)
    assert "model.safetensors" in err


def test_a_run_directory_is_never_overwritten(trained: tuple[Path, str]) -> None:
    _, err = command("train.py", *MEASURED, "run_dir=runs/latest", where=trained[0], code=2)
    assert "holds a run already" in err


def test_a_run_goes_on_only_under_the_config_it_began_with(trained: tuple[Path, str]) -> None:
    _, err = command(
        "train.py",
        *MEASURED,
        "trainer.max_steps=8",
        "optim.lr=1",
        "trainer.resume=runs/latest",
        where=trained[0],
        code=2,
    )
    assert "optim.lr=1.0 (began with 0.01)" in err


def test_a_sweep_gives_each_case_its_directory(tmp_path: Path) -> None:
    command("train.py", *TINY, "trainer.max_steps=2", "measure.enabled=false", "-m", "seed=1,2", where=tmp_path)
    (sweep,) = (path for path in (tmp_path / "runs").iterdir() if path.name.endswith("_sweep"))
    prints = {json.loads((sweep / case / "export" / "manifest.json").read_text())["fingerprint"] for case in "01"}
    assert len(prints) == 2


@pytest.mark.slow
def test_a_sweep_runs_as_jobs_of_a_launcher_and_a_failed_job_is_heard_of(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's local executor takes the jobs that its Slurm one does; what Slurm sets in a job is set here too."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, value in {
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NAME": "sweep",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    jobs = ["-m", "seed=1234,2", "hydra/launcher=submitit_local"]
    command("train.py", *TINY, "trainer.max_steps=8", "measure.enabled=false", *jobs, where=tmp_path)
    (sweep,) = (path for path in (tmp_path / "runs").iterdir() if path.name.endswith("_sweep"))
    alone, *swept = (
        json.loads((run / "export" / "manifest.json").read_text())["fingerprint"]
        for run in (trained[0] / "runs" / "latest", sweep / "0", sweep / "1")
    )
    assert swept[0] == alone != swept[1]
    _, err = command("train.py", *MEASURED, "data=text", "data.path=nothing.txt", *jobs, where=tmp_path, code=2)
    assert "seed=1234 failed" in err
