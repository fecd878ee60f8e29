"""Peaks, names and files of devices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isoforward.base.datasheets import TABLE, Hardware, load, lookup, recognise, save
from isoforward.base.errors import BadInput, Integrity

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


def test_a_hardware_file_is_taken_like_a_name(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    save(path, MINE)
    assert lookup(str(path)) == MINE


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
