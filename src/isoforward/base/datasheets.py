"""What devices can do at most, with sources; and the files that say what a machine was measured to do."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from isoforward.base.caches import cache_directory
from isoforward.base.checks import one_of
from isoforward.base.errors import BadInput, Integrity, StorageFailed
from isoforward.base.hardware import cpu_model, processors
from isoforward.base.storage import write_text

SCHEMA = 1
LARGEST_FILE = 2**20
DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Peaks of one device: dense rates, never the doubled ones of structured sparsity. An absent dtype is unknown.

    A datasheet's GB are taken as 10^9 bytes, which understates what HBM devices report by up to 7 %.
    """

    name: str
    peak_flops_per_s: Mapping[str, float]  # by dtype of DTYPES; matrix units with fp32 accumulation where there are any
    bandwidth_bytes_per_s: float
    memory_bytes: float
    source: str  # the datasheet, or what was run to measure it
    provenance: str = "looked up"
    tdp_w: float | None = None
    price_per_hour_usd: float | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)  # what predict.py needs beyond the peaks

    def __post_init__(self) -> None:
        one_of("hardware.provenance", self.provenance, ("looked up", "measured"))
        for key in ("name", "source"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise BadInput(f"hardware.{key} must be a text")
        if not isinstance(self.peak_flops_per_s, Mapping) or not isinstance(self.calibration, Mapping):
            raise BadInput("hardware.peak_flops_per_s and hardware.calibration must be mappings")
        for dtype, peak in self.peak_flops_per_s.items():
            one_of("hardware.peak_flops_per_s", dtype, DTYPES)
            _positive(f"peak_flops_per_s.{dtype}", peak)
        for key in ("bandwidth_bytes_per_s", "memory_bytes"):
            _positive(key, getattr(self, key))
        for key in ("tdp_w", "price_per_hour_usd"):
            if getattr(self, key) is not None:
                _positive(key, getattr(self, key))


def _positive(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise BadInput(f"hardware.{key}={str(value)[:40]} must be a positive, finite number")


def _listed(row: Mapping[str, str]) -> Hardware:
    return Hardware(
        name=row["name"],
        source=row["source"],
        peak_flops_per_s={dtype: float(row[dtype]) * 1e12 for dtype in DTYPES if row[dtype]},
        bandwidth_bytes_per_s=float(row["gb_per_s"]) * 1e9,
        memory_bytes=float(row["gb"]) * 1e9,
        tdp_w=int(row["tdp_w"]),
    )


# Rates are in 10^12 a second. Datasheets print the tensor rates of L4 and Hopper with sparsity: here they are halved.
_ROWS = list(csv.DictReader(Path(__file__).with_name("datasheets.csv").read_text("utf-8").splitlines()))
TABLE = {row["key"]: _listed(row) for row in _ROWS}
# What drivers call them, whole: a PCIe, NVL, MIG, laptop or export variant has other peaks and is not in here.
DEVICE_NAMES = {name: row["key"] for row in _ROWS for name in row["driver_names"].split(";")}


def recognise(device_name: str) -> Hardware | None:
    """By the whole name that the driver gives; None rather than a relative's peaks."""
    return TABLE.get(DEVICE_NAMES.get(device_name, ""))


def kept_here() -> Path:
    """Where calibrations of this machine are."""
    return cache_directory("hardware")


def calibrated_here() -> Hardware | None:
    """By the newest calibration of a machine with our processors."""
    with suppress(StorageFailed):  # no home: nothing is kept
        for path in sorted(kept_here().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            found = load(path)
            made_on = found.calibration.get("identity", {})
            if made_on.get("cpu") == cpu_model() and made_on.get("processors") == len(processors()):
                return found
    return None


def lookup(name_or_file: str) -> Hardware:
    """A name of TABLE, in any spelling of case, spaces and dashes; a file that `save` wrote; or `here`."""
    if name_or_file == "here":
        if (found := calibrated_here()) is None:
            raise BadInput(
                "hardware=here: this machine has no calibration yet; make one with python experiments/calibrate.py, "
                f"or choose one of {', '.join(TABLE)}"
            )
        return found
    names = {_plain(key): key for key in TABLE}
    if key := names.get(_plain(name_or_file)):
        return TABLE[key]
    path = Path(name_or_file)
    if path.suffix == ".json" or path.exists():
        return load(path)
    near = [names[each] for each in get_close_matches(_plain(name_or_file), names, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise BadInput(
        f"hardware={name_or_file} is not known: {hint}choose one of {', '.join(TABLE)}, "
        "or a file that experiments/calibrate.py wrote"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def save(path: Path, hardware: Hardware) -> None:
    content = {"record": "hardware", "schema": SCHEMA} | asdict(hardware)
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def load(path: Path) -> Hardware:
    if not path.is_file():
        raise BadInput(f"hardware={path} is not a file; write one with python experiments/calibrate.py")
    if path.stat().st_size > LARGEST_FILE:
        raise Integrity(f"{path} is larger than {LARGEST_FILE >> 20} MiB, which no hardware file of ours is")
    try:
        content = json.loads(path.read_bytes().decode(), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Integrity(f"{path} is no hardware file: {str(error)[:200]}") from error
    if not isinstance(content, dict) or content.pop("record", None) != "hardware":
        raise Integrity(f'{path} is no hardware file: it lacks "record": "hardware"')
    schema = content.pop("schema", None)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise Integrity(f"{path} is of schema {str(schema)[:40]}, while this isoforward reads up to {SCHEMA}")
    if odd := content.keys() - {each.name for each in fields(Hardware)}:
        raise Integrity(f"{path} has a field {str(min(odd))[:40]} that no hardware has")
    try:
        return Hardware(**content)
    except (BadInput, TypeError) as error:
        raise Integrity(f"{path}: {str(error)[:300]}") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)
