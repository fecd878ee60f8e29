"""One measurement, one row; the JSON lines that every table, report and dashboard reads."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from isoforward.base.config import one_of
from isoforward.base.errors import BadInput, Integrity, StorageFailed

SCHEMA = 1

LIVES = ("training", "inference")
TRAINING = ("forward", "loss", "backward", "optimizer")
PHASES = (*TRAINING, "prefill", "decode")
BESIDE = ("data", "framework", "communication", "residual")
WHOLES = ("step", "token", "run")
PER = ("step", "token", "sequence", "run")
PROVENANCES = ("measured", "counted", "predicted", "estimated", "unavailable")
CONVENTIONS = ("model", "causal", "hardware")

LONGEST_LINE = 4 * 2**20
LARGEST_FILE = 256 * 2**20

Condition = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """`value` is None exactly where `provenance` is unavailable, and `reason` then says why."""

    experiment: str
    life: str  # training | inference
    phase: str  # PHASES, BESIDE, or a whole: a training step, a served token, a run
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

    def __post_init__(self) -> None:
        _check_types(self)
        one_of("row.life", self.life, LIVES)
        one_of("row.phase", self.phase, PHASES + BESIDE + WHOLES)
        one_of("row.per", self.per, PER)
        one_of("row.provenance", self.provenance, PROVENANCES)
        if self.convention is not None:
            one_of("row.convention", self.convention, CONVENTIONS)
        elif self.quantity == "flops":
            raise BadInput(f"row.convention is not set: FLOPs are counted as one of {', '.join(CONVENTIONS)}")
        if (self.value is None) != (self.provenance == "unavailable"):
            raise BadInput(
                f"row.value={self.value} cannot be {self.provenance}: no value, and only that, is unavailable"
            )
        if self.value is None:
            if not self.reason:
                raise BadInput(f"row.reason is not set: say why the {self.quantity} of {self.phase} is unavailable")
            if self.low is not None or self.high is not None or self.samples:
                raise BadInput("row.value is unavailable, yet row.low, row.high or row.samples is given")
        elif (self.low is None) != (self.high is None):
            raise BadInput("row.low and row.high are given both or neither")
        elif self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise BadInput(f"row.value={self.value} lies outside its interval [{self.low}, {self.high}]")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where rows came from, written once a file. Rows of unlike `identity` are not compared."""

    id: str
    command: str
    created: str  # ISO 8601, UTC
    identity: Mapping[str, Condition]  # cpu, gpu, threads, torch, dtype support, ...: what must match
    details: Mapping[str, Condition]  # what may differ: commit, load, governor, affinity

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the numbers of one experiment can be believed; trusted exactly where there is no reason not to."""

    experiment: str
    trusted: bool
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Condition] = field(default_factory=dict)  # what it was judged by: spread, load, drift, ...
    environment: str = ""  # Environment.id

    def __post_init__(self) -> None:
        _check_types(self)
        if self.trusted == bool(self.reasons):
            raise BadInput(f"verdict.trusted={self.trusted} contradicts its {len(self.reasons)} reasons")


Record = Row | Environment | Verdict
KINDS: dict[str, type[Record]] = {"row": Row, "environment": Environment, "verdict": Verdict}


@dataclass(frozen=True, kw_only=True)
class Results:
    rows: tuple[Row, ...]
    environments: Mapping[str, Environment]  # by id
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]  # about the file, not about its numbers


def write(path: Path | str, records: Iterable[Record]) -> None:
    """Appends to `path`, all of `records` or none; a damaged last line, as a killed run leaves it, is cut off first."""
    path = Path(path)
    left = "".join(_line(record) for record in records).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            end, whole = _end_of_records(file.fileno())
            left = left if whole else b"\n" + left
            try:
                file.truncate(end)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise StorageFailed(
            f"{path} could not be written: {error.strerror or error}. Earlier lines are kept; "
            "make room or choose another run_dir"
        ) from error


def read(path: Path | str) -> Results:
    """A torn last line, as a killed run leaves it, is left out with a warning; any other damage is an Integrity."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} is not a file; name the results.jsonl of a run")
    if path.stat().st_size > LARGEST_FILE:
        raise Integrity(f"{path} is larger than {LARGEST_FILE >> 20} MiB, which no results file of ours is")
    records: list[Record] = []
    warnings = []
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise Integrity(f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MiB")
            try:
                content = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                if file.read(1):
                    raise Integrity(f"{path}, line {number} is damaged: {str(error)[:200]}") from error
                warnings.append(f"{path}, line {number}, the last, is damaged (a killed run?) and left out")
                break
            try:
                records.append(_record(content))
            except (BadInput, Integrity) as error:
                raise Integrity(f"{path}, line {number}: {str(error)[:300]}") from error
    return Results(
        rows=tuple(r for r in records if isinstance(r, Row)),
        environments={r.id: r for r in records if isinstance(r, Environment)},
        verdicts=tuple(r for r in records if isinstance(r, Verdict)),
        warnings=tuple(warnings),
    )


def refuse_unlike(one: Environment, other: Environment) -> None:
    """Numbers from places that differ in `identity` are not compared; the refusal names what differs."""
    keys = sorted(one.identity.keys() | other.identity.keys())
    unlike = [key for key in keys if one.identity.get(key) != other.identity.get(key)]
    if unlike:
        shown = ", ".join(f"{key} ({one.identity.get(key)} and {other.identity.get(key)})" for key in unlike)
        raise BadInput(f"not compared: the environments differ in {shown}; measure both in one place")


def _line(record: Record) -> str:
    kind = next(name for name, of in KINDS.items() if isinstance(record, of))
    content: dict[str, Any] = {"record": kind, "schema": SCHEMA}
    for each in fields(record):
        value = getattr(record, each.name)
        content[each.name] = dict(value) if isinstance(value, Mapping) else value
    line = json.dumps(content, allow_nan=False) + "\n"
    if len(line) > LONGEST_LINE:
        raise BadInput(f"a {kind} of {len(line) >> 20} MiB is too long for one line; keep fewer samples in it")
    return line


def _end_of_records(descriptor: int) -> tuple[int, bool]:
    """Where to go on writing, which is before a damaged last line, and whether a new line starts there."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - LONGEST_LINE)
    tail = os.pread(descriptor, size - start, start)
    last = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    try:
        json.loads(last.decode())
    except (ValueError, RecursionError):
        return size - len(last), True
    return size, last.endswith(b"\n")


def _record(content: object) -> Record:
    if not isinstance(content, dict):
        raise Integrity(f"not a record: {reprlib.repr(content)}")
    schema, name = content.pop("schema", None), content.pop("record", None)
    if type(schema) is not int or schema < 1:
        raise Integrity(f"its schema is {reprlib.repr(schema)}, not a version number")
    if schema > SCHEMA:
        raise Integrity(
            f"written under schema {schema}, while this isoforward reads up to {SCHEMA}: upgrade isoforward"
        )
    if not isinstance(name, str) or name not in KINDS:
        raise Integrity(f"record {reprlib.repr(name)} is not one of {', '.join(KINDS)}")
    kind = KINDS[name]
    known = {each.name for each in fields(kind)}
    needed = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}
    if odd := content.keys() - known:
        raise Integrity(f"a {name} has no field {reprlib.repr(min(odd))}")
    if absent := needed - content.keys():
        raise Integrity(f"the {name} lacks {', '.join(sorted(absent))}")
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }
    return kind(**arguments)


def _is_number(value: object) -> bool:
    """Finite, and not a bool."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_condition(value: object) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value)


FITS: dict[str, Callable[[Any], bool]] = {  # by the annotation of a field
    "str": _is_text,
    "bool": lambda value: isinstance(value, bool),
    "str | None": lambda value: value is None or _is_text(value),
    "float | None": lambda value: value is None or _is_number(value),
    "tuple[str, ...]": lambda value: isinstance(value, tuple) and all(map(_is_text, value)),
    "tuple[float, ...]": lambda value: isinstance(value, tuple) and all(map(_is_number, value)),
    "Mapping[str, Condition]": lambda value: (
        isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(_is_condition, value.values()))
    ),
}


def _check_types(record: Record) -> None:
    for each in fields(record):
        value = getattr(record, each.name)
        if not FITS[str(each.type)](value):
            name = f"{type(record).__name__.lower()}.{each.name}"
            raise BadInput(f"{name} cannot be {reprlib.repr(value)}: it takes a finite {each.type}")
