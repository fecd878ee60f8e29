"""Peaks from datasheets, devices by their whole names, checked files, and the record of where numbers came from."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import isoforward
from isoforward.base import hardware
from isoforward.base.config import ModelConfig
from isoforward.base.datasheets import TABLE, Hardware, load, lookup, recognise, save
from isoforward.base.errors import BadInput, Integrity
from isoforward.base.hardware import auto_precision, environment
from isoforward.base.results import refuse_unlike
from isoforward.measure.case import Case
from isoforward.measure.train_and_serve import peak_rows

CPU = torch.device("cpu")
MINE = Hardware(
    name="two cores",
    peak_flops_per_s={"fp32": 1.1e11, "bf16": 5e10},
    bandwidth_bytes_per_s=1.2e10,
    memory_bytes=24e9,
    source="experiments/calibrate.py",
    provenance="measured",
    price_per_hour_usd=0.1,
    calibration={"matmul": [[512, 1e11]], "overhead_s": 3e-6},
)


# The table


def test_tensor_rates_are_what_the_units_can_multiply() -> None:
    """Units x FLOPs a clock x boost clock, from the architecture whitepapers: dense, without sparsity's doubling."""
    assert TABLE["v100"].peak_flops_per_s["fp16"] == pytest.approx(640 * 128 * 1.53e9, rel=0.005)
    assert TABLE["a100"].peak_flops_per_s["bf16"] == pytest.approx(432 * 512 * 1.41e9, rel=0.005)
    assert TABLE["h100"].peak_flops_per_s["bf16"] == pytest.approx(528 * 1024 * 1.83e9, rel=0.005)
    assert TABLE["rtx_4090"].peak_flops_per_s["bf16"] == pytest.approx(512 * 128 * 2.52e9, rel=0.005)
    assert TABLE["l4"].peak_flops_per_s["bf16"] == pytest.approx(240 * 256 * 2.04e9, rel=0.05)
    assert TABLE["t4"].peak_flops_per_s["fp16"] == pytest.approx(320 * 128 * 1.59e9, rel=0.005)
    assert TABLE["mi300x"].peak_flops_per_s["bf16"] == pytest.approx(304 * 2048 * 2.1e9, rel=0.005)


def test_bandwidth_is_bus_width_times_pin_rate() -> None:
    pins = {"a100": (5120, 3.186e9), "a100_40gb": (5120, 2.43e9), "h100": (5120, 5.23e9), "mi300x": (8192, 5.2e9)}
    pins |= {"rtx_4090": (384, 21e9), "l4": (192, 12.5e9), "t4": (256, 10e9), "v100": (4096, 1.75e9)}
    for name, (bits, rate) in pins.items():
        assert TABLE[name].bandwidth_bytes_per_s == pytest.approx(bits * rate / 8, rel=0.01), name


def test_the_peak_of_a_published_utilisation_is_ours() -> None:
    """llm-foundry's MFU table divides by 989.5 TFLOP/s for H100, nanoGPT's by 312 for A100."""
    assert TABLE["h100"].peak_flops_per_s["bf16"] == 989.5e12
    assert TABLE["a100"].peak_flops_per_s["bf16"] == 312e12


def test_hopper_differs_in_memory_only() -> None:
    assert TABLE["h200"].peak_flops_per_s == TABLE["h100"].peak_flops_per_s
    assert TABLE["h200"].bandwidth_bytes_per_s > TABLE["h100"].bandwidth_bytes_per_s


def test_a_dtype_that_a_device_cannot_multiply_is_absent() -> None:
    assert "bf16" not in TABLE["v100"].peak_flops_per_s
    assert "bf16" not in TABLE["t4"].peak_flops_per_s
    assert "fp8" not in TABLE["a100"].peak_flops_per_s


@pytest.mark.parametrize("key", TABLE)
def test_every_entry_has_a_source_and_no_price(key: str) -> None:
    assert TABLE[key].source
    assert TABLE[key].provenance == "looked up"
    assert TABLE[key].price_per_hour_usd is None


# Names


@pytest.mark.parametrize(
    ("device_name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_device_is_recognised_by_its_drivers_name(device_name: str, key: str) -> None:
    assert recognise(device_name) is TABLE[key]


@pytest.mark.parametrize(
    "relative",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 NVL",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA L40S",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "",
    ],
)
def test_a_relative_of_a_known_device_is_unknown(relative: str) -> None:
    assert recognise(relative) is None


@pytest.mark.parametrize("spelling", ["rtx_4090", "RTX 4090", "rtx4090", "RTX-4090"])
def test_a_name_may_be_spelt_as_people_do(spelling: str) -> None:
    assert lookup(spelling) is TABLE["rtx_4090"]


def test_an_unknown_name_is_refused_with_its_neighbours() -> None:
    with pytest.raises(BadInput, match=r"hardware=h1000 is not known: did you mean h100"):
        lookup("h1000")
    with pytest.raises(BadInput, match="choose one of v100"):
        lookup("abacus")


# Files


def test_a_hardware_file_is_taken_like_a_name(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    save(path, MINE)
    assert lookup(str(path)) == MINE


def test_the_hardware_that_is_asked_for_gives_the_peaks_that_rates_are_held_against(tmp_path: Path) -> None:
    save(tmp_path / "mine.json", MINE)
    case = Case(experiment="phase_costs", model=ModelConfig(vocab=96), hardware=str(tmp_path / "mine.json"))
    assert {row.quantity: row.value for row in peak_rows(case)} == {"peak_flops": 1.1e11, "peak_bandwidth": 1.2e10}


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(BadInput, match=r"hardware=nowhere\.json is not a file"):
        lookup("nowhere.json")


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(key)


def having(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({key: value})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (having("schema", 2), "schema 2, while this isoforward reads up to 1"),
        (without("schema"), "schema None"),
        (having("schema", True), "schema True"),
        (having("record", "row"), "no hardware file"),
        (having("_target_", "os.system"), "_target_"),
        (without("source"), "source"),
        (having("source", 3), "source"),
        (having("bandwidth_bytes_per_s", "fast"), "bandwidth_bytes_per_s"),
        (having("memory_bytes", 0), "memory_bytes"),
        (having("memory_bytes", -1.0), "memory_bytes"),
        (having("memory_bytes", True), "memory_bytes"),
        (having("price_per_hour_usd", 0), "price_per_hour_usd"),
        (having("peak_flops_per_s", [1]), "mappings"),
        (having("peak_flops_per_s", {"fp12": 1.0}), "fp12"),
        (having("peak_flops_per_s", {"fp32": None}), "peak_flops_per_s.fp32"),
        (having("calibration", "fast"), "mappings"),
        (having("calibration", {"deep": [{"x": math.nan}]}), "NaN"),
        (having("calibration", {"deep": [{"x": -math.inf}]}), "-Infinity"),
        (having("provenance", "guessed"), "guessed"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = tmp_path / "here.json"
    save(path, MINE)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(Integrity) as refusal:
        load(path)
    assert says in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b'{"record": "hardware", "schema": 1, "memory_bytes": 1e999}']
)
def test_a_file_that_is_no_json_object_of_finite_numbers_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "here.json").write_bytes(text)
    with pytest.raises(Integrity, match="no hardware file"):
        load(tmp_path / "here.json")


def test_a_file_of_boundless_size_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "here.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Integrity, match="larger"):
        load(tmp_path / "here.json")


@pytest.mark.parametrize("price", [0.0, -1.0, math.nan, math.inf])
def test_a_price_must_be_positive(price: float) -> None:
    with pytest.raises(BadInput, match="price_per_hour_usd"):
        Hardware(
            name="x",
            source="y",
            peak_flops_per_s={},
            bandwidth_bytes_per_s=1.0,
            memory_bytes=1.0,
            price_per_hour_usd=price,
        )


# The environment


def test_the_environment_says_what_must_match_and_what_may_differ() -> None:
    here = environment("python train.py", CPU)
    assert here.identity["torch"] == torch.__version__
    assert here.identity["threads"] == torch.get_num_threads()
    assert here.identity["processors"] == len(os.sched_getaffinity(0))
    assert (here.identity["device"], here.identity["gpu"], here.identity["cuda"]) == ("cpu", None, None)
    assert here.details["affinity"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert datetime.fromisoformat(here.created).utcoffset() is not None


def test_a_change_of_threads_makes_environments_unlike() -> None:
    before, threads = environment("a", CPU), torch.get_num_threads()
    refuse_unlike(before, environment("another command", CPU))
    torch.set_num_threads(threads + 1)
    try:
        after = environment("a", CPU)
    finally:
        torch.set_num_threads(threads)
    assert after.id != before.id
    with pytest.raises(BadInput, match=rf"differ in threads \({threads} and {threads + 1}\)"):
        refuse_unlike(before, after)


def test_nothing_of_the_user_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    here = environment("python /home/alice/work/train.py data.path=/home/alice/secret.txt", CPU)
    assert here.command == "python ~/work/train.py data.path=~/secret.txt"
    shown = json.dumps([here.command, dict(here.identity), dict(here.details)])
    assert "alice" not in shown
    assert os.uname().nodename not in [*here.identity.values(), *here.details.values()]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_our_own_checkout_and_its_changed_files_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        named = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *named, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "src"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "other").touch()
    git("init")
    git("add", "other")
    git("commit", "-m", "somebody else's")
    monkeypatch.setattr(isoforward, "__file__", str(package / "__init__.py"))
    found = environment("", CPU).details
    assert (found["commit"], found["changed"]) == (None, None)
    git("add", ".")
    git("commit", "-m", "ours")
    (package / "new.py").touch()
    found = environment("", CPU).details
    assert (found["commit"], found["changed"]) == (git("rev-parse", "HEAD"), 1)


@pytest.mark.parametrize(
    ("files", "processors", "memory_bytes"),
    [
        ({"cpu.max": "150000 100000\n", "memory.max": "1073741824\n"}, 1.5, 2**30),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ({"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}, 0.5, None),
        ({"cpu.cfs_quota_us": "-1\n", "memory.limit_in_bytes": "9223372036854771712\n"}, None, None),
        ({}, None, None),
    ],
    ids=["version 2", "version 2 without limits", "version 1", "version 1 without limits", "none"],
)
def test_limits_of_the_control_group_are_recorded(
    control_groups: Path, files: dict[str, str], processors: float | None, memory_bytes: int | None
) -> None:
    for name, text in files.items():
        (control_groups / "job" / "step" / name).write_text(text)
    details = environment("", CPU).details
    assert (details["cpu_limit"], details["memory_limit_bytes"]) == (processors, memory_bytes)


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of version 2, in which this process is /job/step/task."""
    (tmp_path / "job" / "step" / "task").mkdir(parents=True)
    real = hardware._text
    monkeypatch.setattr(hardware, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(
        hardware, "_text", lambda path: "0::/job/step/task\n" if path == "/proc/self/cgroup" else real(path)
    )
    return tmp_path


@pytest.mark.parametrize("level", ["", "job", "job/step", "job/step/task"])
def test_the_least_limit_holds_at_whichever_level_it_stands(control_groups: Path, level: str) -> None:
    for above in ("", "job", "job/step", "job/step/task"):
        (control_groups / above / "memory.max").write_text("max\n")
        (control_groups / above / "cpu.max").write_text("400000 100000\n")
    (control_groups / level / "memory.max").write_text(f"{2 * 10**9}\n")
    (control_groups / level / "cpu.max").write_text("50000 100000\n")
    assert hardware.memory_limit_bytes() == hardware.memory_bytes() == 2 * 10**9
    assert environment("", CPU).details["cpu_limit"] == 0.5


@pytest.mark.parametrize(
    ("quota", "asked", "threads"),
    [("250000", None, "2"), ("50000", None, "1"), ("250000", "3", "3"), ("max", None, None), ("800000", None, None)],
    ids=["two and a half", "half", "asked for", "no quota", "more than there are"],
)
def test_threads_follow_the_quota_unless_they_are_asked_for(
    control_groups: Path, monkeypatch: pytest.MonkeyPatch, quota: str, asked: str | None, threads: str | None
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "processors", lambda: list(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    (control_groups / "job" / "cpu.max").write_text(f"{quota} 100000\n")
    said = hardware.follow_quota()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert (said is None) == (asked is not None or threads is None)
    if said is not None:
        assert said.startswith(f"{threads} thread") and torch.get_num_threads() == int(threads or 0)
    torch.set_num_threads(before)


def test_a_machine_without_proc_and_a_user_without_a_home_have_a_record_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unobtainable(*_: object) -> Any:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(hardware, "_text", lambda path: None)
    monkeypatch.setattr(os, "getloadavg", unobtainable)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert environment("python train.py", CPU).details["load"] is None


def test_compile_without_a_compiler_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from isoforward.base.hardware import refuse_without_compiler; refuse_without_compiler()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CXX": "/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "BadInput: compile=true needs a C++ compiler, and CXX=/none does not run here" in done.stderr


# Precision


@pytest.mark.parametrize(
    ("capable", "bf16_s", "precision", "why"),
    [
        (False, 0.001, "fp32", "no bf16 instructions"),
        (True, 0.004, "fp32", "2.00 x the time"),
        (True, 0.00195, "fp32", "0.97 x the time"),
        (True, 0.0005, "bf16", "0.25 x the time"),
    ],
)
def test_bf16_is_chosen_only_where_the_machine_has_it_and_it_proves_faster(
    monkeypatch: pytest.MonkeyPatch, capable: bool, bf16_s: float, precision: str, why: str
) -> None:
    def planted(device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[], float]:
        return lambda: {torch.float32: 0.002, torch.bfloat16: bf16_s}[dtype]

    monkeypatch.setattr(hardware, "reference_kernel", planted)
    monkeypatch.setattr(hardware, "_multiplies_bf16", lambda device: capable)
    hardware._auto_precision.cache_clear()
    chosen, reason = auto_precision(CPU)
    hardware._auto_precision.cache_clear()
    assert chosen == precision
    assert why in reason


@pytest.mark.parametrize(
    ("cpuinfo", "capable"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f amx_bf16\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("", False),
    ],
)
def test_bf16_instructions_are_read_from_the_processors_flags(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, capable: bool
) -> None:
    monkeypatch.setattr(hardware, "_text", lambda path: cpuinfo)
    assert hardware._multiplies_bf16(CPU) is capable


def test_choosing_a_precision_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    assert hardware.reference_kernel("cpu")() > 0
    assert hardware.reference_kernel("cpu", torch.bfloat16)() > 0
    assert torch.equal(torch.get_rng_state(), before)
