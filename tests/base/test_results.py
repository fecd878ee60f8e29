"""Rows and the file that holds them: what goes in comes out, and what is damaged or foreign is named."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoforward.base import results
from isoforward.base.errors import BadInput, Integrity, StorageFailed
from isoforward.base.results import (
    Environment,
    Record,
    Row,
    Verdict,
    at_most_one,
    only,
    read,
    refuse_unlike,
    write,
)
from tests import planted

ROW = Row(
    experiment="cost_ladder",
    life="training",
    phase="forward",
    quantity="time",
    unit="s",
    per="step",
    value=0.02,
    low=0.019,
    high=0.022,
    interval="order statistics",
    confidence=0.9375,
    samples=(0.019, 0.02, 0.022),
    warnings=("steal",),
    conditions={"family": "gpt2", "batch": 8, "lr": 0.5, "compile": False, "dtype": None},
    environment="abc",
)
NO_INTERVAL: dict[str, Any] = dict.fromkeys(("low", "high", "interval", "confidence"))
ENVIRONMENT = Environment(
    id="abc",
    command="python train.py",
    created="2026-01-02T03:04:05+00:00",
    identity={"threads": 2, "gpu": None},
    details={"load": 0.5},
)
VERDICT = Verdict(experiment="cost_ladder", trusted=False, reasons=("spread",), figures={"spread": 0.2})


def line(**changes: object) -> str:
    content = {
        "record": "row",
        "schema": 1,
        "experiment": "e",
        "life": "inference",
        "phase": "decode",
        "quantity": "time",
        "unit": "s",
        "per": "token",
        "value": 0.5,
    } | changes
    return json.dumps({key: value for key, value in content.items() if value != "ABSENT"}) + "\n"


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    write(path, [ENVIRONMENT, ROW])
    write(path, [VERDICT])
    found = read(path)
    assert found.rows == (ROW,)
    assert found.environments == {"abc": ENVIRONMENT}
    assert found.verdicts == (VERDICT,)
    assert found.warnings == ()


def test_whole_lines_are_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []
    monkeypatch.setattr(
        "isoforward.base.results.os.fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_size)
    )
    write(tmp_path / "r", [ENVIRONMENT, ROW])
    assert forced == [(tmp_path / "r").stat().st_size]


def test_each_line_names_its_kind_and_schema(tmp_path: Path) -> None:
    write(tmp_path / "r", [ENVIRONMENT, ROW, VERDICT])
    lines = [json.loads(each) for each in (tmp_path / "r").read_text().splitlines()]
    assert [(each["record"], each["schema"]) for each in lines] == [("environment", 2), ("row", 2), ("verdict", 2)]


@settings(deadline=None)
@given(
    value=st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**24), 10**24)),
    text=st.text(),
    samples=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
)
def test_any_number_and_any_text_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, value: float, text: str, samples: tuple[float, ...]
) -> None:
    path = tmp_path_factory.mktemp("results") / "r"
    row = replace(ROW, value=value, **NO_INTERVAL, samples=samples, conditions={"peer": text, "batch": value})
    write(path, [row])
    assert read(path).rows == (row,)


def test_a_count_beyond_a_floats_digits_stays_exact(tmp_path: Path) -> None:
    write(tmp_path / "r", [replace(ROW, value=2**64 + 1, **NO_INTERVAL)])
    assert read(tmp_path / "r").rows[0].value == 18446744073709551617


@pytest.mark.parametrize("keep", [1, 40, 150, 299])
def test_a_file_cut_within_its_last_line_is_read_up_to_it_with_a_warning(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "r"
    write(path, [ENVIRONMENT])
    whole = path.stat().st_size
    write(path, [ROW])
    path.write_bytes(path.read_bytes()[: whole + keep])
    found = read(path)
    assert found.rows == ()
    assert list(found.environments) == ["abc"]
    assert len(found.warnings) == 1
    assert "line 2" in found.warnings[0]


def test_writing_after_a_killed_run_cuts_the_torn_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write(path, [ROW, ROW])
    path.write_bytes(path.read_bytes()[:-30])
    write(path, [VERDICT])
    found = read(path)
    assert (found.rows, found.verdicts, found.warnings) == ((ROW,), (VERDICT,), ())


def test_a_whole_last_line_without_its_newline_is_kept_when_more_is_written(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write(path, [ROW])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read(path).rows == (ROW,)
    write(path, [ROW])
    assert read(path).rows == (ROW, ROW)


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"value": ' + b"9" * 5000 + b"}"], ids=lambda d: repr(d[:8])
)
def test_damage_before_the_last_line_is_named_by_its_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "r"
    path.write_bytes(line().encode() + damage + b"\n" + line().encode())
    with pytest.raises(Integrity, match="line 2"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 3}, "schema 3, while this isoforward reads up to 2"),
        ({"schema": "ABSENT"}, "schema"),
        ({"schema": True}, "schema"),
        ({"schema": 0}, "schema"),
        ({"record": "ABSENT"}, "record"),
        ({"record": []}, "record"),
        ({"record": "_target_"}, "record"),
        ({"_target_": "os.system"}, "_target_"),
        ({"per": "ABSENT"}, "per: Field required"),
        ({"unit": "ms"}, "unit of time 'ms' is not declared"),
        ({"quantity": "tme"}, "did you mean time?"),
        ({"conditions": {"bacth": 1}}, "did you mean batch?"),
        ({"interval": "a guess", "low": 0.1, "high": 0.9, "schema": 2}, "interval 'a guess'"),
        ({"value": "0.5"}, "value"),
        ({"value": True}, "value"),
        ({"value": math.nan}, "value"),
        ({"value": math.inf}, "value"),
        ({"value": 10**400}, "value"),
        ({"value": None}, "unavailable"),
        ({"samples": [1, math.nan]}, "samples"),
        ({"samples": {"a": 1}}, "samples"),
        ({"conditions": {"batch": [1]}}, "conditions"),
        ({"conditions": {"batch": -math.inf}}, "conditions"),
        ({"conditions": {"batch": 10**400}}, "conditions"),
        ({"samples": [-(10**400)]}, "samples"),
        ({"warnings": "one"}, "warnings"),
        ({"phase": "forwards"}, "forwards"),
        ({"life": "afterlife"}, "afterlife"),
    ],
)
def test_a_line_that_is_no_record_of_ours_is_refused_even_where_it_is_the_last(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    path = tmp_path / "r"
    path.write_text(line() + line(**changes))
    with pytest.raises(Integrity, match="line 2") as refusal:
        read(path)
    assert says in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_number_that_overflows_to_infinity_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_text(line().replace("0.5", "1e999"))
    with pytest.raises(Integrity, match="value"):
        read(tmp_path / "r")


def test_a_line_or_a_file_of_boundless_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    path.write_bytes(b" " * (results.LONGEST_LINE + 1))
    with pytest.raises(Integrity, match="line 1 is longer"):
        read(path)
    monkeypatch.setattr(results, "LARGEST_FILE", 1000)
    with pytest.raises(Integrity, match="is larger than"):
        read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="not a file"):
        read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"value": None, **NO_INTERVAL, "samples": ()},
        {"interval": None},
        {"unit": "ms"},
        {"provenance": "unavailable", "reason": "no sensor"},
        {"value": None, "provenance": "unavailable", **NO_INTERVAL, "samples": ()},
        {"value": None, "provenance": "unavailable", "reason": "no sensor"},
        {"value": 0.03},
        {"value": 0.018},
        {"low": None},
        {"value": math.nan},
        {"value": math.inf, "high": math.inf},
        {"samples": [0.1]},
        {"conditions": {"n": math.nan}},
        {"conditions": {"n": np.int64(3)}},
        {"conditions": {1: 2}},
        {"quantity": "flops"},
        {"convention": "palm"},
        {"provenance": "guessed"},
        {"per": "second"},
        {"phase": "sleep"},
        {"life": "both"},
    ],
    ids=str,
)
def test_a_row_that_contradicts_itself_cannot_be_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"row|Row"):
        replace(ROW, **changes)  # type: ignore[arg-type]


def test_an_unavailable_row_carries_its_reason_through_the_file(tmp_path: Path) -> None:
    row = replace(
        ROW,
        quantity="energy",
        unit="",
        value=None,
        **NO_INTERVAL,
        samples=(),
        provenance="unavailable",
        reason="no sensor",
    )
    write(tmp_path / "r", [row])
    assert read(tmp_path / "r").rows == (row,)


@pytest.mark.parametrize(("trusted", "reasons"), [(True, ("spread",)), (False, ())])
def test_a_verdict_is_trusted_exactly_where_no_reason_speaks_against_it(trusted: bool, reasons: tuple[str]) -> None:
    with pytest.raises(ValueError, match="trusted"):
        Verdict(experiment="e", trusted=trusted, reasons=reasons)


def test_a_full_disk_keeps_the_earlier_lines_and_leaves_no_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write(path, [ROW])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(StorageFailed, match="r could not be written"):
            write(path, [ROW])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before


def test_a_record_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write(path, [ROW])
    before = path.read_bytes()

    def records() -> list[Record]:
        return [ROW, replace(ROW, samples=(0.123456789,) * 500_000)]

    with pytest.raises(BadInput, match="too long for one line"):
        write(path, records())
    assert path.read_bytes() == before


def test_writing_onto_a_directory_is_a_storage_failure(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=tmp_path.name):
        write(tmp_path, [ROW])


def test_unlike_environments_are_not_compared_and_the_refusal_names_what_differs() -> None:
    refuse_unlike(ENVIRONMENT, replace(ENVIRONMENT, id="other", details={"load": 9.0}))
    with pytest.raises(BadInput, match=r"threads \(2 and 4\), torch \(None and 2\.13\)"):
        refuse_unlike(ENVIRONMENT, replace(ENVIRONMENT, identity={"threads": 4, "gpu": None, "torch": "2.13"}))


def test_a_file_of_schema_1_still_loads_and_its_intervals_get_their_kind(tmp_path: Path) -> None:
    at = {"unit": "nats", "quantity": "loss", "per": "token", "value": 2.0, "low": 1.9, "high": 2.1}
    (tmp_path / "r").write_text(line(low=0.4, high=0.6) + line(**at))
    time, loss = read(tmp_path / "r").rows
    assert (time.interval, time.confidence) == ("order statistics", None)
    assert (loss.interval, loss.unit) == ("range", "nat")


def test_one_row_is_one_row_and_two_are_refused() -> None:
    half = replace(ROW, conditions={**ROW.conditions, "batch": 4})
    assert only([ROW, half], batch=4) == half
    with pytest.raises(BadInput, match="2 rows have phase=forward; say which, by batch"):
        only([ROW, half], phase="forward")
    with pytest.raises(BadInput, match="no row has phase=decode"):
        only([ROW, half], phase="decode")
    assert at_most_one([ROW], phase="decode") is None


def timed(phase: str, *samples: float, **changes: Any) -> Row:
    return replace(ROW, phase=phase, **NO_INTERVAL, samples=samples, environment="", **changes)


PAIRS = ((1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99), (2.0, 2.02, 1.98, 2.04, 1.96, 2.0, 2.02, 1.98))
COMPARED = planted.compared(timed("backward", *PAIRS[1]), timed("forward", *PAIRS[0]))


def test_a_comparison_survives_the_file_and_judges_its_rows_either_way_round(tmp_path: Path) -> None:
    forward, backward = timed("forward", *[1.0] * 6), timed("backward", *[1.0] * 7)  # the pairs say otherwise
    write(tmp_path / "r", [forward, backward, COMPARED])
    found = read(tmp_path / "r")
    assert found.comparisons == (COMPARED,)
    there, back = found.judge(backward, forward), found.judge(forward, backward)
    assert (there.outcome, back.outcome) == ("slower", "faster")
    assert (there.ratio.value, back.ratio.value) == (pytest.approx(2.0), pytest.approx(0.5))
    assert back.ratio.low == pytest.approx(1 / there.ratio.high)


@pytest.mark.parametrize("changes", [{"experiment": "another"}, {"environment": "elsewhere"}], ids=str)
def test_a_comparison_of_another_experiment_or_place_judges_no_rows_of_this_one(changes: dict[str, Any]) -> None:
    rows = [timed("forward", *PAIRS[0]), timed("backward", *PAIRS[0])]
    found = planted.results_of(rows, [replace(COMPARED, **changes)])
    assert found.judge(rows[1], rows[0]).ratio.value == pytest.approx(1.0)


def test_rows_of_places_that_no_record_tells_are_not_judged() -> None:
    rows = [timed("forward", *PAIRS[0]), replace(timed("backward", *PAIRS[1]), environment="nowhere")]
    with pytest.raises(BadInput, match="no record tells where training forward was measured"):
        planted.results_of(rows).judge(*rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"low": 0.0},
        {"low": -1.0},
        {"low": 2.5},
        {"high": 1.5},
        {"value": math.inf, "high": math.inf},
        {"margin": 0.0},
        {"outcome": "no difference"},
        {"interval": "a guess"},
        {"pairs": 8.5},
    ],
    ids=str,
)
def test_a_comparison_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Comparison"):
        replace(COMPARED, **changes)
    write(tmp_path / "r", [COMPARED])
    content = json.loads((tmp_path / "r").read_text()) | changes
    (tmp_path / "r").write_text(json.dumps(content) + "\n")
    with pytest.raises(Integrity, match="line 1: the comparison"):
        read(tmp_path / "r")
