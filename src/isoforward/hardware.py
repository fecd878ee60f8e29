"""What machines can do at most, with sources; which one this is; the environment record that goes with its numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoforward import __version__
from isoforward.config import one_of
from isoforward.errors import BadInput, Integrity
from isoforward.results import Condition, Environment
from isoforward.storage import write_atomically

if TYPE_CHECKING:
    import torch

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


def _device(name: str, source: str, *, tera: Mapping[str, float], gb_per_s: float, gb: float, tdp_w: float) -> Hardware:
    return Hardware(
        name=name,
        source=source,
        peak_flops_per_s={dtype: rate * 1e12 for dtype, rate in tera.items()},
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        memory_bytes=gb * 1e9,
        tdp_w=tdp_w,
    )


# Datasheets print the tensor rates of L4 and Hopper with sparsity: here they are halved.
_AMPERE = {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312, "int8": 624}
_HOPPER = {"fp32": 67, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5, "fp8": 1979, "int8": 1979}
TABLE: dict[str, Hardware] = {
    "v100": _device(
        "NVIDIA V100 SXM2 32GB",
        "NVIDIA V100 datasheet",
        tera={"fp32": 15.7, "fp16": 125},
        gb_per_s=900,
        gb=32,
        tdp_w=300,
    ),
    "t4": _device(
        "NVIDIA T4",
        "NVIDIA T4 product brief; rates from the Turing architecture whitepaper",
        tera={"fp32": 8.1, "fp16": 65, "int8": 130},
        gb_per_s=320,
        gb=16,
        tdp_w=70,
    ),
    "a100": _device(
        "NVIDIA A100 SXM4 80GB", "NVIDIA A100 80GB datasheet", tera=_AMPERE, gb_per_s=2039, gb=80, tdp_w=400
    ),
    "a100_40gb": _device(
        "NVIDIA A100 SXM4 40GB", "NVIDIA A100 datasheet", tera=_AMPERE, gb_per_s=1555, gb=40, tdp_w=400
    ),
    "h100": _device("NVIDIA H100 SXM5 80GB", "NVIDIA H100 datasheet", tera=_HOPPER, gb_per_s=3350, gb=80, tdp_w=700),
    "h200": _device("NVIDIA H200 SXM", "NVIDIA H200 datasheet", tera=_HOPPER, gb_per_s=4800, gb=141, tdp_w=700),
    "b200": _device(
        "NVIDIA B200 SXM",
        "NVIDIA Blackwell architecture technical brief, HGX B200 at 1000 W; memory from the DGX B200 datasheet",
        tera={"fp32": 80, "tf32": 1100, "bf16": 2250, "fp16": 2250, "fp8": 4500, "int8": 4500},
        gb_per_s=8000,
        gb=180,
        tdp_w=1000,
    ),
    "mi300x": _device(
        "AMD Instinct MI300X",
        "AMD Instinct MI300X datasheet",
        tera={"fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4, "fp8": 2614.9, "int8": 2614.9},
        gb_per_s=5300,
        gb=192,
        tdp_w=750,
    ),
    "l4": _device(
        "NVIDIA L4",
        "NVIDIA L4 datasheet",
        tera={"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121, "fp8": 242.5, "int8": 242.5},
        gb_per_s=300,
        gb=24,
        tdp_w=72,
    ),
    "rtx_4090": _device(
        "NVIDIA GeForce RTX 4090",
        "NVIDIA Ada GPU architecture whitepaper, appendix A",
        tera={"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "int8": 660.6},
        gb_per_s=1008,
        gb=24,
        tdp_w=450,
    ),
}

# What drivers call them, whole: a PCIe, NVL, MIG, laptop or export variant has other peaks and is not in here.
DEVICE_NAMES = {
    "Tesla V100-SXM2-32GB": "v100",
    "Tesla T4": "t4",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "A100-SXM4-40GB": "a100_40gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "AMD Instinct MI300X": "mi300x",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx_4090",
}


def recognise(device_name: str) -> Hardware | None:
    """By the whole name that the driver gives; None rather than a relative's peaks."""
    key = DEVICE_NAMES.get(device_name)
    return None if key is None else TABLE[key]


def lookup(name_or_file: str) -> Hardware:
    """A name of TABLE, in any spelling of case, spaces and dashes, or a file that `save` wrote."""
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
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


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


def processors() -> list[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cgroup(name: str, controller: str) -> str | None:
    """A control file of our control group, of version 2 or of version 1; None where there is none."""
    root = Path("/sys/fs/cgroup")
    within = [line.rsplit(":", 1)[1].lstrip("/") for line in (_text("/proc/self/cgroup") or "").splitlines()]
    for top in (root, root / controller):
        for path in [*within, ""]:
            if (text := _text(top / path / name)) is not None:
                return text
    return None


def environment(command: str, device: torch.device) -> Environment:
    """`device` is where the numbers come from. Nothing of the user: no host name, and their home as ~."""
    import numpy
    import torch

    home = str(Path.home())
    command = command if home == "/" else command.replace(home, "~")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    on_gpu = device.type == "cuda"
    identity: dict[str, Condition] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processors": len(processors()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": (torch.version.cuda or torch.version.hip) if on_gpu else None,
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "os": platform.system(),
    }
    commit, changed = _commit()
    details: dict[str, Condition] = {
        "isoforward": __version__,
        "numpy": numpy.__version__,
        "commit": commit,
        "changed": changed,  # files that differ from the commit
        "kernel": platform.release(),
        "affinity": ",".join(map(str, processors())),
        "governor": (_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "").strip() or None,
        "load": os.getloadavg()[0],
        "cpu_limit": _cpu_limit(),
        "memory_limit_bytes": _memory_limit_bytes(),
        "memory_free_bytes": _memory_free_bytes(),
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
    }
    digest = hashlib.sha256(json.dumps([identity, created, command]).encode()).hexdigest()
    return Environment(id=digest[:12], command=command, created=created, identity=identity, details=details)


def auto_precision(device: torch.device) -> tuple[str, str]:
    """fp32 or bf16, and why: bf16 where the machine has instructions for it and they prove the faster ones."""
    return _auto_precision(str(device))


@cache
def _auto_precision(device_name: str) -> tuple[str, str]:
    import torch

    device = torch.device(device_name)
    if not _multiplies_bf16(device):
        return "fp32", f"{device.type} has no bf16 instructions here"
    fp32_s, bf16_s = reference_kernel(device)(), reference_kernel(device, torch.bfloat16)()
    shown = f"bf16 matrix products take {bf16_s / fp32_s:.2f} x the time of fp32 here"
    return ("bf16" if bf16_s < 0.9 * fp32_s else "fp32"), shown


def reference_kernel(device: torch.device | str, dtype: torch.dtype | None = None) -> Callable[[], float]:
    """Seconds of one matrix product (fp32 unless asked otherwise), the shortest of five. Draws no random number."""
    import torch

    device = torch.device(device)
    n = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(n, n, device=device, dtype=dtype or torch.float32)

    def once() -> float:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    once()  # the libraries' set-up
    return lambda: min(once() for _ in range(5))


def _multiplies_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _text("/proc/cpuinfo") or "", re.M)
    if device.type != "cpu" or flags is None:
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags[1].split())


def _text(path: Path | str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", _text("/proc/cpuinfo") or "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def _cpu_limit() -> float | None:
    """Processors' worth of time that the control group grants."""
    either = cgroup("cpu.max", "cpu") or " ".join(
        cgroup(name, "cpu") or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    )
    granted = re.match(r"(\d+)\s+(\d+)", either)  # "max" and -1 stand for no limit
    return int(granted[1]) / int(granted[2]) if granted else None


def _memory_limit_bytes() -> int | None:
    text = (cgroup("memory.max", "memory") or cgroup("memory.limit_in_bytes", "memory") or "max").strip()
    return None if text == "max" or int(text) >= 2**60 else int(text)  # version 1 writes "none" as almost 2^63


def _memory_free_bytes() -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo") or "", re.M)
    return int(found[1]) * 1024 if found else None


def _commit() -> tuple[str | None, int | None]:
    """Of the checkout that this package runs from, and how many of its files differ; (None, None) outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    # Installed beneath another project's checkout, its commit would not be ours.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return (commit or "").strip() or None, None if changes is None else len(changes.splitlines())
