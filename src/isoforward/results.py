"""One measurement, one row; rows with intervals; the JSON lines that every table, report and dashboard reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEMA = 1

LIVES = ("training", "inference")
PHASES = ("forward", "loss", "backward", "optimizer", "prefill", "decode")
BESIDE = ("data", "framework", "communication", "residual")
PROVENANCES = ("measured", "counted", "predicted", "estimated", "unavailable")
CONVENTIONS = ("model", "causal", "hardware")

Condition = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """`value` is None exactly where `provenance` is unavailable, and `reason` then says why."""

    experiment: str
    life: str  # training | inference
    phase: str  # PHASES, BESIDE, or step (a whole training step) and token (a whole served token)
    quantity: str  # time, flops, bytes, memory, energy, money, ...
    unit: str  # s, flop, byte, joule, usd, ... : never scaled here
    per: str  # step | token | sequence | run
    value: float | None
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()
    provenance: str = "measured"
    convention: str | None = None  # FLOPs only
    reason: str | None = None
    warnings: tuple[str, ...] = ()  # why not to trust it too far
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    environment: str = ""  # Environment.id


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where rows came from, written once a file. Rows of unlike `identity` are not compared."""

    id: str
    command: str
    created: str  # ISO 8601, UTC
    identity: Mapping[str, Condition]  # cpu, gpu, threads, torch, dtype support, ...: what must match
    details: Mapping[str, Condition]  # what may differ: commit, load, governor, affinity
