"""One measurement, one row; the JSON lines that every table, report and dashboard reads."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, TypedDict, Unpack

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from isoforward.base import vocabulary
from isoforward.base.errors import BadInput, Integrity, StorageFailed, did_you_mean
from isoforward.base.statistics import KINDS, MARGIN, OUTCOMES, Interval, Judgement, Ratio, judge, ratio, ratio_unpaired

SCHEMA = 2
MOST_REASONS = 2  # to doubt a run that are told
LONGEST_LINE = 4 * 2**20
LARGEST_FILE = 256 * 2**20

LARGEST = int(sys.float_info.max)

Number = Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | float  # an integer may have more digits than a float
Told = str | Number | bool | None  # a Condition, checked
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def declared(field: str, value: str, words: Iterable[str]) -> None:
    """An undeclared word would name a column that no table and no comparison finds again."""
    words = tuple(words)
    if value not in words:
        hint = did_you_mean(value, words)
        raise ValueError(f"{field} {reprlib.repr(value)} is not declared: {hint}base/vocabulary.py lists them")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Row:
    """`value` is None exactly where `provenance` is unavailable, and `reason` then says why.

    Raises pydantic's ValidationError, a ValueError, where a field is of the wrong type or a word is not declared.
    """

    experiment: str
    life: str
    phase: str
    quantity: str
    unit: str = ""  # of its quantity, unless it has several; never scaled here
    per: str
    value: Number | None
    low: Number | None = None
    high: Number | None = None
    interval: str | None = None  # kind of [low, high]: one of statistics.KINDS
    confidence: float | None = None  # of the interval; None where no level is stated, as of a range
    samples: tuple[Number, ...] = ()  # in order of time
    retaken: tuple[Number, ...] = ()  # samples that something else disturbed, so that they were taken again
    provenance: str = "measured"
    convention: str | None = None  # FLOPs only
    reason: str | None = None
    warnings: tuple[str, ...] = ()  # why not to trust it too far
    conditions: Mapping[str, Told] = dataclasses.field(default_factory=dict)
    environment: str = ""  # Environment.id

    def __post_init__(self) -> None:
        declared("life", self.life, vocabulary.LIVES)
        declared("phase", self.phase, vocabulary.PHASES + vocabulary.BESIDE + vocabulary.WHOLES)
        declared("per", self.per, vocabulary.PER)
        declared("provenance", self.provenance, vocabulary.PROVENANCES)
        declared("quantity", self.quantity, vocabulary.QUANTITIES)
        for key, value in self.conditions.items():
            declared("condition", key, vocabulary.CONDITIONS)
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"conditions: no float holds {key}")
        units = vocabulary.QUANTITIES[self.quantity].units
        if not self.unit:
            object.__setattr__(self, "unit", units[0])
        declared(f"unit of {self.quantity}", self.unit, units)
        if self.convention is not None:
            declared("convention", self.convention, vocabulary.CONVENTIONS)
        elif self.quantity == "flops":
            raise ValueError(f"convention is not set: FLOPs are counted as one of {', '.join(vocabulary.CONVENTIONS)}")
        if (self.value is None) != (self.provenance == "unavailable"):
            raise ValueError(f"value={self.value} cannot be {self.provenance}: no value, and only that, is unavailable")
        if self.value is None:
            if not self.reason:
                raise ValueError(f"reason is not set: say why the {self.quantity} of {self.phase} is unavailable")
            if self.low is not None or self.high is not None or self.samples:
                raise ValueError("value is unavailable, yet low, high or samples is given")
            return
        if not (self.low is None) == (self.high is None) == (self.interval is None):
            raise ValueError("low, high and interval, their kind, are given together or not at all")
        if self.low is not None and self.high is not None and self.interval is not None:
            declared("interval", self.interval, KINDS)
            if not self.low <= self.value <= self.high:
                raise ValueError(f"value={self.value} lies outside its interval [{self.low}, {self.high}]")

    @property
    def number(self) -> float:
        """The value, where an answer cannot do without: BadInput, with the reason, where it is unavailable."""
        if self.value is None:
            raise BadInput(f"the {self.quantity} of {self.life} {self.phase} is not there: {self.reason}")
        return self.value

    def setting(self, key: str) -> float:
        """A condition that is a number."""
        value = self.conditions[key]
        assert isinstance(value, int | float), key
        return value


class RowFields(TypedDict, total=False):
    """Fields of a row, of which an experiment's name is not one, as they are handed on."""

    life: str
    phase: str
    quantity: str
    unit: str
    per: str
    value: Number | None
    low: Number | None
    high: Number | None
    interval: str | None
    confidence: float | None
    samples: tuple[Number, ...]
    retaken: tuple[Number, ...]
    provenance: str
    convention: str | None
    reason: str | None
    warnings: tuple[str, ...]
    conditions: Mapping[str, Told]
    environment: str


def unavailable(why: str) -> RowFields:
    return {"value": None, "provenance": "unavailable", "reason": why}


def row_of(experiment: str, *shared: RowFields, **fields: Unpack[RowFields]) -> Row:
    """What rows share, and what is a row's own: where a field is given twice, the last one holds."""
    merged: RowFields = {}
    for each in (*shared, fields):
        merged.update(each)
    return Row(experiment=experiment, **merged)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Subject:
    """What was timed, as its row names it."""

    life: str
    phase: str
    conditions: Mapping[str, Told] = dataclasses.field(default_factory=dict)

    def names(self, row: Row) -> bool:
        same = (self.life, self.phase) == (row.life, row.phase)
        return same and row.quantity == "time" and dict(self.conditions) == dict(row.conditions)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Comparison:
    """The time of one piece of work as a multiple of another's, from pairs that ran one directly after the other."""

    experiment: str
    first: Subject
    second: Subject
    value: float  # below 1 the first needs less
    low: float
    high: float
    interval: str  # its kind
    confidence: float
    pairs: int
    looks: int  # at the samples, planned before they were taken; the confidence holds over all
    margin: float  # relative difference that counts as equal
    outcome: str  # faster | slower | equal | undecided
    needed_s: float | None = None  # of further measuring, where it is undecided
    retaken: int = 0  # pairs
    environment: str = ""  # Environment.id

    def __post_init__(self) -> None:
        declared("interval", self.interval, KINDS)
        declared("outcome", self.outcome, OUTCOMES)
        if not 0 < self.low <= self.value <= self.high:
            raise ValueError(f"value={self.value} lies outside its interval [{self.low}, {self.high}], or not above 0")
        if self.margin <= 0:
            raise ValueError(f"margin={self.margin} is not above 0")

    def of(self, first: Row, second: Row) -> bool:
        same = all((row.experiment, row.environment) == (self.experiment, self.environment) for row in (first, second))
        return same and self.first.names(first) and self.second.names(second)

    @property
    def ratio(self) -> Ratio:
        interval = Interval(
            low=self.low, high=self.high, kind=self.interval, confidence=self.confidence, looks=self.looks
        )
        return Ratio(value=self.value, interval=interval, n=self.pairs)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Environment:
    """Where rows came from, written once a file. Rows of unlike `identity` are not compared."""

    id: str
    command: str
    created: str  # ISO 8601, UTC
    identity: Mapping[str, Told]  # cpu, gpu, threads, torch, dtype support, ...: what must match
    details: Mapping[str, Told]  # what may differ: commit, load, governor, affinity


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Verdict:
    """Whether the numbers of one experiment can be believed; trusted exactly where there is no reason not to."""

    experiment: str
    trusted: bool
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Told] = dataclasses.field(default_factory=dict)  # what it was judged by
    environment: str = ""  # Environment.id

    def __post_init__(self) -> None:
        if self.trusted == bool(self.reasons):
            raise ValueError(f"trusted={self.trusted} contradicts its {len(self.reasons)} reasons")


Record = Row | Comparison | Environment | Verdict
RECORDS: dict[str, type[Record]] = {
    "row": Row,
    "comparison": Comparison,
    "environment": Environment,
    "verdict": Verdict,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    rows: tuple[Row, ...]
    environments: Mapping[str, Environment]  # by id
    verdicts: tuple[Verdict, ...]
    comparisons: tuple[Comparison, ...] = ()
    warnings: tuple[str, ...] = ()  # about the file, not about its numbers

    @property
    def doubts(self) -> list[str]:
        """Why not to trust these numbers too far: of all verdicts' reasons the first ones, each once, at most two."""
        ranked = (verdict.reasons[n:][:1] for n in range(MOST_REASONS) for verdict in self.verdicts)
        return list(dict.fromkeys(chain.from_iterable(ranked)))[:MOST_REASONS]

    def judge(self, first: Row, second: Row, *, margin: float = MARGIN) -> Judgement:
        """Of the first's time, seen from the second's: by the pairs that were timed for it, where there are some.

        Samples of files written before there were comparisons shared rounds, and are paired in their order.
        """
        for one in self.comparisons:
            if one.of(first, second):
                return judge(one.ratio, margin=one.margin)
            if one.of(second, first):
                return judge(one.ratio.inverse(), margin=one.margin)
        if first.environment != second.environment:
            refuse_unlike(*(self.place_of(row) for row in (first, second)))
        paired = len(first.samples) == len(second.samples)
        return judge((ratio if paired else ratio_unpaired)(first.samples, second.samples), margin=margin)

    def place_of(self, row: Row) -> Environment:
        if row.environment not in self.environments:
            raise BadInput(f"not compared: no record tells where {row.life} {row.phase} was measured")
        return self.environments[row.environment]


def select(rows: Results | Iterable[Row], **wanted: object) -> list[Row]:
    """Rows whose fields, or else conditions, are as `wanted`; a condition wanted as None must be absent."""
    fields = Row.__dataclass_fields__

    def has(row: Row, key: str, value: object) -> bool:
        return bool((getattr(row, key) if key in fields else row.conditions.get(key)) == value)

    every = rows.rows if isinstance(rows, Results) else rows
    return [row for row in every if all(has(row, *one) for one in wanted.items())]


def at_most_one(rows: Results | Iterable[Row], **wanted: object) -> Row | None:
    """The row that is as `wanted`, or None. BadInput where several are."""
    found = select(rows, **wanted)
    if len(found) > 1:
        apart = [key for key in found[0].conditions if len({row.conditions.get(key) for row in found}) > 1]
        raise BadInput(f"{len(found)} rows have {spelt(wanted)}; say which, by {', '.join(apart) or 'environment'}")
    return found[0] if found else None


def only(rows: Results | Iterable[Row], **wanted: object) -> Row:
    """The one row that is as `wanted`; BadInput where there is none, or where several are."""
    found = at_most_one(rows, **wanted)
    if found is None:
        raise BadInput(f"no row has {spelt(wanted)}")
    return found


def spelt(wanted: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in wanted.items())


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
            except Integrity as error:
                raise Integrity(f"{path}, line {number}: {str(error)[:300]}") from error
    return Results(
        rows=tuple(r for r in records if isinstance(r, Row)),
        environments={r.id: r for r in records if isinstance(r, Environment)},
        verdicts=tuple(r for r in records if isinstance(r, Verdict)),
        comparisons=tuple(r for r in records if isinstance(r, Comparison)),
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
    name = next(name for name, kind in RECORDS.items() if isinstance(record, kind))
    content = {"record": name, "schema": SCHEMA} | dataclasses.asdict(record)
    line = json.dumps(content, allow_nan=False) + "\n"
    if len(line) > LONGEST_LINE:
        raise BadInput(f"a {name} of {len(line) >> 20} MiB is too long for one line; keep fewer samples in it")
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
    if not isinstance(name, str) or name not in RECORDS:
        raise Integrity(f"record {reprlib.repr(name)} is not one of {', '.join(RECORDS)}")
    if schema == 1 and name == "row":
        _from_schema_1(content)
    try:
        return _adapter(name).validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        raise Integrity(f"the {name}: {where + ': ' if where else ''}{told}") from error


@cache
def _adapter(name: str) -> TypeAdapter[Record]:
    return TypeAdapter(RECORDS[name])


UNITS_OF_SCHEMA_1 = {"nats": "nat", "of context": "power"}


def _from_schema_1(row: dict[str, object]) -> None:
    """Intervals did not say their kind, and two units had two names."""
    unit = row.get("unit")
    if isinstance(unit, str):
        row["unit"] = UNITS_OF_SCHEMA_1.get(unit, unit)
    if row.get("low") is not None:
        over_seeds = row.get("quantity") in ("loss", "loss_by_flops", "time_to_loss")
        row["interval"] = "range" if over_seeds else "order statistics"
