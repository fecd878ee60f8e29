"""The report: one file that says what the rows say, shows no number without its origin, and lets nothing in or out."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from isoforward.base.results import Environment, Record, Results, Row, Verdict, read, write
from isoforward.base.statistics import summarise
from isoforward.base.vocabulary import Condition
from isoforward.measure.passes import fields
from isoforward.show import report, tables
from isoforward.show.compare import compare
from isoforward.show.model_card import about_costs
from isoforward.show.report import main, write_report
from tests.browser import Browser, chromium

LAYERS, WIDTH, PARAMETERS = 4, 128, 921_600
BATCH, LENGTH, PROMPT = 16, 256, 128
TRAINING_S = {"forward": 0.0331, "loss": 0.0042, "backward": 0.0718, "optimizer": 0.0063}
ENVIRONMENT = Environment(
    id="e1",
    command="python train.py model=tiny",
    created="2026-01-02T03:04:05+00:00",
    identity={"device": "cpu", "cpu": "Xeon", "threads": 2, "gpu": None, "torch": "2.13.0"},
    details={"commit": "abc1234", "load": 0.2, "governor": None},
)


def two_lives(*, slower: float = 1.0, seed: int = 1, **labels: Condition) -> list[Record]:
    """The rows of one run in which both lives were measured, as `measure` writes them."""
    draw = random.Random(seed)
    shape: dict[str, Condition] = {
        "family": "gpt2",
        "layers": LAYERS,
        "width": WIDTH,
        "heads": 4,
        "vocab": 1024,
        "parameters": PARAMETERS,
    }
    conditions = {**shape, "dtype": "bf16", **labels}
    training: dict[str, Any] = {
        **conditions,
        "batch": BATCH,
        "length": LENGTH,
        "tokens": BATCH * LENGTH,
        "optimizer": "adamw",
    }
    rows: list[Row] = []

    def add(life: str, phase: str, quantity: str, per: str, value: float | None, **more: Any) -> None:
        rows.append(
            Row(
                experiment="phase_costs",
                life=life,
                phase=phase,
                quantity=quantity,
                per=per,
                value=value,
                **{"conditions": conditions, "environment": "e1", **more},
            )
        )

    def timed(life: str, phase: str, per: str, value: float, **at: Condition) -> None:
        samples = [slower * value * draw.lognormvariate(0, 0.02) for _ in range(15)]
        more = fields(summarise(samples))
        add(life, phase, "time", per, more.pop("value"), **more, conditions={**conditions, **at})

    add("inference", "forward", "identity", "run", 0.0, conditions={**conditions, "logits": 262144})
    for phase, value in TRAINING_S.items():
        timed("training", phase, "step", value, **training)
    timed("training", "step", "step", sum(TRAINING_S.values()) * 1.004, **training)
    timed("training", "residual", "step", 0.0005, **training)
    add("training", "step", "time", "step", 0.31, conditions={**training, "cold": True})
    timed("inference", "forward", "step", 0.0272, batch=BATCH, length=LENGTH, tokens=BATCH * LENGTH)
    serving: dict[str, Condition] = {"batch": 1, "prompt": PROMPT}
    decoding: dict[str, Any] = {**serving, "tokens": 1, "new_tokens": 64, "cache": True}
    timed("inference", "prefill", "sequence", 0.00195, **serving, tokens=PROMPT)
    timed("inference", "decode", "token", 0.00081, **decoding)
    for context in (16, 32, 64, 128, 256):
        timed("inference", "decode", "token", 0.0008 + context * 1e-7, batch=1, tokens=1, context=context, cache=True)
        timed(
            "inference", "decode", "token", 0.0007 + context * 1.4e-5, batch=1, tokens=1, context=context, cache=False
        )
    counted: dict[str, Any] = {"provenance": "counted", "convention": "model"}
    forward_flops = 8.6e9
    for phase, flops in {
        "forward": forward_flops,
        "loss": 0.0,
        "backward": 2 * forward_flops,
        "optimizer": 1e7,
    }.items():
        add("training", phase, "flops", "step", flops, **counted, conditions=training)
    at: dict[str, Condition] = {"batch": BATCH, "length": LENGTH, "tokens": BATCH * LENGTH}
    add("inference", "forward", "flops", "step", forward_flops, **counted, conditions={**conditions, **at})
    at = {**conditions, **serving, "tokens": PROMPT}
    add("inference", "prefill", "flops", "sequence", 2.6e8, **counted, conditions=at)
    add("inference", "decode", "flops", "token", 2.05e6, **counted, conditions={**conditions, **decoding})
    predicted: dict[str, Any] = {"provenance": "predicted"}
    add("inference", "prefill", "bytes", "sequence", 2.2e6, **predicted, conditions=at)
    add("inference", "decode", "bytes", "token", 2.1e6, **predicted, conditions={**conditions, **decoding})
    for life, phase in (("training", "step"), ("inference", "run")):
        why: dict[str, Any] = {"provenance": "unavailable", "reason": "no energy meter on this machine"}
        add(life, phase, "energy", "step" if life == "training" else "sequence", None, **why)
    for phase, peak in {"forward": 9.1e7, "loss": 1.3e8, "backward": 1.42e8, "optimizer": 2.1e7}.items():
        add("training", phase, "memory", "step", peak, conditions=training)
    for phase, peak in {"forward": 2.6e7, "prefill": 3.4e6, "decode": 2.6e6}.items():
        add("inference", phase, "memory", "sequence", peak)
    ledgers = {
        "training": {
            "parameters": 3.7e6,
            "gradients": 3.7e6,
            "optimizer state": 7.4e6,
            "activations.attention": 2.9e7,
            "activations.mlp": 3.8e7,
            "activations.norm": 9.0e6,
            "logits and loss": 3.4e7,
            "temporaries": 1.7e7,
        },
        "inference": {"weights": 1.85e6, "KV cache": 5.2e5, "transients": 3.0e5},
    }
    for life, ledger in ledgers.items():
        whole: dict[str, Any] = {"life": life, "phase": "step" if life == "training" else "run", "per": "step"}
        beside = {"measured peak": sum(ledger.values()) * 1.03, "unexplained": sum(ledger.values()) * 0.03}
        for category, size in (ledger | beside).items():
            kind: dict[str, Any] = {"provenance": "measured" if category in beside else "counted"}
            at = {**(training if life == "training" else conditions), "category": category}
            add(**whole, quantity="memory", value=size, **kind, conditions=at)
    return [ENVIRONMENT, *rows, Verdict(experiment="phase_costs", trusted=True, environment="e1")]


def peaks() -> list[Record]:
    whole: dict[str, Any] = {
        "experiment": "phase_costs",
        "life": "training",
        "phase": "run",
        "per": "run",
        "environment": "e1",
    }
    whole["interval"] = "order statistics"
    return [
        Row(**whole, quantity="peak_flops", value=1.9e12, low=1.85e12, high=1.93e12),
        Row(**whole, quantity="peak_bandwidth", value=2.4e10, low=2.3e10, high=2.5e10),
    ]


def ladder() -> list[Record]:
    """Rows of a question that is not about both lives."""
    whole: dict[str, Any] = {
        "experiment": "cost_ladder",
        "life": "training",
        "phase": "forward",
        "quantity": "time",
        "per": "step",
    }
    whole |= {"interval": "order statistics", "environment": "e1"}
    times = {"inference_mode": 0.020, "no_grad": 0.021, "training mode": 0.029}
    return [
        ENVIRONMENT,
        *(Row(**whole, value=t, low=t * 0.98, high=t * 1.03, conditions={"rung": rung}) for rung, t in times.items()),
    ]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Vega in the page, which takes seconds to bundle."""
    monkeypatch.setattr(report, "javascript", lambda: "window.vegaEmbed = () => {};")


def run_of(directory: Path, records: list[Record]) -> Path:
    write(directory / "results.jsonl", records)
    return directory


def page_of(directory: Path, records: list[Record], **more: Any) -> str:
    results = read(run_of(directory, records) / "results.jsonl")
    return write_report(results, directory / "report.html", **more).read_text(encoding="utf-8")


class Reader(HTMLParser):
    """What a browser would find: elements with their attributes, text that is seen, what scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, text: str) -> None:
        if self.inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + text)
        elif self.inside != "style":
            self.seen.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())

    @property
    def specs(self) -> list[Any]:
        return [json.loads(text) for attributes, text in self.scripts if attributes.get("type") == "application/json"]


def typical_ratio(rows: tuple[Row, ...]) -> float:
    """Of a step to the frozen forward, pair by pair: the median of the means of any two pairs (Hodges and Lehmann)."""
    step = next(r for r in rows if (r.phase, r.quantity) == ("step", "time") and "cold" not in r.conditions)
    forward = next(r for r in rows if (r.life, r.phase, r.quantity) == ("inference", "forward", "time"))
    logs = [math.log(a / b) for a, b in zip(step.samples, forward.samples, strict=True)]
    return math.exp(statistics.median((a + b) / 2 for n, a in enumerate(logs) for b in logs[n:]))


@pytest.mark.usefixtures("stubbed")
def test_the_sentence_at_the_top_holds_the_numbers_of_this_run(tmp_path: Path) -> None:
    records = two_lives()
    found = Reader(page_of(tmp_path, records)).text
    ratio = typical_ratio(tuple(r for r in records if isinstance(r, Row)))
    told = rf"costs {ratio:.2f}x \( ([\d.]+)x to ([\d.]+)x \) its forward pass in time"
    (interval,) = re.findall(told, found)
    assert float(interval[0]) < ratio < float(interval[1])
    assert "3.00x in FLOPs" in found  # (F + 2F + little) / F
    assert f"{1.42e8 / 2.6e7:.2f}x in memory" in found


@pytest.mark.usefixtures("stubbed")
def test_every_phase_stands_in_the_table_with_its_interval_and_origin(tmp_path: Path) -> None:
    records = two_lives()
    reader = Reader(page_of(tmp_path, records))
    backward = next(r for r in records if isinstance(r, Row) and (r.phase, r.quantity) == ("backward", "time"))
    assert backward.value and backward.low and backward.high
    assert f"{backward.value * 1e3:.1f} ms" in reader.text
    assert f"{backward.low * 1e3:.1f} ms to {backward.high * 1e3:.1f} ms" in reader.text
    for name in ("forward", "loss", "backward", "optimizer", "whole step", "forward, same batch", "prefill", "decode"):
        assert name in reader.text
    titles = [attributes.get("title") or "" for tag, attributes in reader.elements if tag == "abbr"]
    timed = "measured; median of 15 samples; interval: order statistics, 0.965"
    assert any(title.startswith(timed) for title in titles)
    assert any(title.startswith("measured; slower; interval: signed rank, 0.952") for title in titles)
    assert any(title.startswith("counted in the model convention") for title in titles)


@pytest.mark.usefixtures("stubbed")
def test_identity_verdict_command_environment_and_sample_are_shown(tmp_path: Path) -> None:
    found = Reader(page_of(tmp_path, two_lives(), sample="ROMEO: but soft")).text
    assert "0 of 262,144 logits differ" in found
    assert "These numbers can be trusted" in found
    assert "python train.py model=tiny" in found
    assert "torch 2.13.0" in found
    assert "ROMEO: but soft" in found


@pytest.mark.usefixtures("stubbed")
def test_a_doubt_is_told_at_the_top_and_at_each_time_but_not_at_what_is_counted(tmp_path: Path) -> None:
    *rows, _ = two_lives()
    verdict = Verdict(experiment="phase_costs", trusted=False, reasons=("spread: wide",), environment="e1")
    reader = Reader(page_of(tmp_path, [*rows, verdict]))
    assert "Take these numbers with care: spread: wide." in reader.text
    badges = [attributes for tag, attributes in reader.elements if tag == "abbr"]
    doubted = {(b["title"] or "").split(";")[0].split(" ")[0] for b in badges if "doubtful" in (b["class"] or "")}
    assert doubted == {"measured"}
    assert any("doubtful" not in (b["class"] or "") for b in badges)


@pytest.mark.usefixtures("stubbed")
def test_a_trusted_run_is_shown_without_any_mark_of_doubt(tmp_path: Path) -> None:
    page = page_of(tmp_path, two_lives())
    assert "known as precisely as was asked" in Reader(page).text
    assert not [1 for tag, attributes in Reader(page).elements if "doubt" in (attributes.get("class") or "")]
    results = read(tmp_path / "results.jsonl")
    table = io.StringIO()
    tables.verdicts(Console(file=table), results)
    assert "can be trusted" in table.getvalue()
    card = about_costs(compare(results), ENVIRONMENT.identity)
    assert "no reason to doubt" in card and "with care" not in card


@pytest.mark.usefixtures("stubbed")
def test_at_most_two_reasons_are_told_wherever_there_are_more(tmp_path: Path) -> None:
    *rows, _ = two_lives()
    two = [
        Verdict(experiment="phase_costs", trusted=False, reasons=(f"{n} first", f"{n} second"), environment="e1")
        for n in ("one", "other")
    ]
    assert Reader(page_of(tmp_path, [*rows, *two])).text.count("with care: one first; other first.") == 1
    results = read(tmp_path / "results.jsonl")
    assert results.doubts == compare(results).warnings == ["one first", "other first"]


@pytest.mark.usefixtures("stubbed")
def test_what_is_not_known_is_called_unavailable(tmp_path: Path) -> None:
    known = [r for r in two_lives() if not (isinstance(r, Row) and r.quantity in ("memory", "bytes"))]
    found = Reader(page_of(tmp_path, known)).text
    assert "Unavailable: these rows hold no memory ledger." in found
    assert "Unavailable: these rows hold no peak FLOP/s" in found
    assert "unavailable (no energy meter on this machine)" in found
    assert "0 B" not in found
    assert "x in memory" not in found


@pytest.mark.usefixtures("stubbed")
def test_the_roofline_places_what_has_bytes_and_names_what_has_none(tmp_path: Path) -> None:
    found = Reader(page_of(tmp_path, two_lives() + peaks())).text
    assert "1.90 TFLOP/s and 24.0 GB/s" in found
    assert "not placed, for want of FLOPs or bytes: forward, loss, backward, optimizer, forward, same batch" in found


@pytest.mark.usefixtures("stubbed")
def test_break_even_divides_the_cost_of_a_trained_token_by_that_of_a_served_one(tmp_path: Path) -> None:
    found = Reader(page_of(tmp_path, two_lives())).text
    assert f"{(3 * 8.6e9 + 1e7) / (BATCH * LENGTH) / 2.05e6:.2f} in FLOPs" in found


@pytest.mark.usefixtures("stubbed")
def test_a_phase_has_one_colour_in_every_picture_and_table(tmp_path: Path) -> None:
    reader = Reader(page_of(tmp_path, two_lives() + peaks()))
    swatches = {a["style"] for _, a in reader.elements if a.get("class") == "swatch"}
    found: dict[str, set[str]] = {}

    def look(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("domain"), list) and isinstance(node.get("range"), list):
                for name, colour in zip(node["domain"], node["range"], strict=False):
                    found.setdefault(str(name), set()).add(str(colour))
            if "phase" in node and "colour" in node:
                found.setdefault(node["phase"], set()).add(node["colour"])
            for child in node.values():
                look(child)
        elif isinstance(node, list):
            for child in node:
                look(child)

    look(reader.specs)
    phases = ("forward", "loss", "backward", "optimizer", "prefill", "decode")
    assert all(len(found[phase]) == 1 for phase in phases)
    assert {f"background: {colour}" for phase in phases for colour in found[phase]} <= swatches


@pytest.mark.usefixtures("stubbed")
def test_a_comparison_that_fails_its_identity_check_is_not_shown_as_one(tmp_path: Path) -> None:
    records = [replace(r, value=7.0) if isinstance(r, Row) and r.quantity == "identity" else r for r in two_lives()]
    found = Reader(page_of(tmp_path, records)).text
    assert "Training this model costs" not in found
    assert "Both lives are not compared: 7 logits of the frozen forward are not those of training's forward." in found


@pytest.mark.usefixtures("stubbed")
def test_lives_that_were_checked_and_measured_several_times_are_told_row_by_row(tmp_path: Path) -> None:
    found = Reader(page_of(tmp_path, two_lives() + two_lives(seed=2)[1:])).text
    assert "Training this model costs" not in found
    assert "Both lives are not compared: 2 rows have quantity=identity; say which" in found


@pytest.mark.usefixtures("stubbed")
def test_a_ratio_that_is_none_is_called_equal_or_undecided(tmp_path: Path) -> None:
    """Backward as fast as the frozen forward; optimizer about as fast, with much noise."""
    frozen = [0.0272 * (1 + 0.001 * (n % 3)) for n in range(15)]
    planted_in = {"backward": frozen[::-1], "optimizer": [s * (1 + 0.2 * (-1) ** n) for n, s in enumerate(frozen)]}
    records: list[Record] = []
    for record in two_lives():
        samples = None
        if isinstance(record, Row) and record.quantity == "time" and record.samples:
            samples = (
                frozen if (record.life, record.phase) == ("inference", "forward") else planted_in.get(record.phase)
            )
        if isinstance(record, Row) and samples:
            record = replace(record, **fields(summarise(samples)))
        records.append(record)
    found = Reader(page_of(tmp_path, records)).text
    assert "equal within 3%" in found
    assert "undecided, 0.8" in found


@pytest.mark.usefixtures("stubbed")
def test_rows_of_any_other_question_are_told_and_drawn(tmp_path: Path) -> None:
    reader = Reader(page_of(tmp_path, ladder(), headline="Keeping a graph costs 1.45x."))
    assert "Keeping a graph costs 1.45x ." in reader.text
    assert "Cost ladder: time per step" in reader.text
    assert "29.0 ms" in reader.text
    assert "Nothing vouches for these numbers" in reader.text
    (spec,) = reader.specs
    drawn = [mark for marks in spec["datasets"].values() for mark in marks if "low" in mark]
    assert next((mark["series"], mark["low"], mark["high"]) for mark in drawn) == (
        "inference_mode",
        pytest.approx(20 * 0.98),  # in ms, as its axis is
        pytest.approx(20 * 1.03),
    )


@pytest.mark.usefixtures("stubbed")
def test_rows_over_a_number_become_a_curve_for_each_way(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"experiment": "scaling", "life": "training", "quantity": "time", "per": "step"}
    rows: list[Record] = [
        Row(**whole, phase=phase, value=width * cost, conditions={"width": width, "parameters": width * width})
        for phase, cost in (("forward", 1e-4), ("backward", 2e-4))
        for width in (64, 128, 256, 512)
    ]
    (spec,) = Reader(page_of(tmp_path, rows)).specs
    drawn = [mark for marks in spec["datasets"].values() for mark in marks if mark.get("x") == 512]
    assert {mark["series"] for mark in drawn} == {"training forward", "training backward"}


@pytest.mark.usefixtures("stubbed")
def test_the_csv_behind_a_picture_holds_its_numbers_and_no_formula(tmp_path: Path) -> None:
    rung = ladder()[1]
    assert isinstance(rung, Row)
    reader = Reader(page_of(tmp_path, [*ladder(), replace(rung, conditions={"rung": "=HYPERLINK(1)"})]))
    link = next(a["href"] for tag, a in reader.elements if tag == "a" and a.get("download") == "cost_ladder_time.csv")
    assert link and link.startswith("data:text/csv;charset=utf-8,")
    rows = list(csv.DictReader(io.StringIO(unquote(link.partition(",")[2]))))
    assert [float(row["value"]) for row in rows] == [0.020, 0.021, 0.029, 0.020]
    assert rows[0] | {"unit": "s", "rung": "inference_mode", "provenance": "measured"} == rows[0]
    assert rows[-1]["rung"] == "'=HYPERLINK(1)"


@pytest.mark.usefixtures("stubbed")
def test_nothing_in_the_page_makes_a_request(tmp_path: Path) -> None:
    page = page_of(tmp_path, two_lives() + peaks(), sample="https://example.org/x.js")
    reader = Reader(page)
    addressed = [
        value
        for _, attributes in reader.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster", "background", "ping", "formaction")
    ]
    assert addressed and all(value and value.startswith("data:") for value in addressed)
    assert not {tag for tag, _ in reader.elements} & {"iframe", "object", "embed", "img", "video", "audio", "base"}
    assert "@import" not in page and "url(" not in page
    policy = next(a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy and "unsafe-eval" not in policy
    running = [text for attributes, text in reader.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>\"'{{7*7}}"


def hostile(text: str) -> list[Record]:
    """`text` wherever a file lets one write what one likes: names of quantities and conditions are declared ones."""
    place = Environment(id="e", command=text, created=text, identity={text: text}, details={text: text})
    whole: dict[str, Any] = {
        "life": "training",
        "phase": "forward",
        "per": "step",
        "conditions": {"rung": text},
        "environment": "e",
    }
    odd = Row(**whole, experiment=text, quantity="time", value=1.0, warnings=(text,))
    missing: dict[str, Any] = {"value": None, "provenance": "unavailable", "reason": text}
    why = Verdict(experiment=text, trusted=False, reasons=(text,), environment="e")
    varied = replace(odd, conditions={"rung": f"{text}."}, value=2.0)
    return [place, odd, varied, Row(**whole, experiment=text, quantity="energy", **missing), why]


@pytest.mark.usefixtures("stubbed")
def test_a_script_in_any_text_stays_text(tmp_path: Path) -> None:
    reader = Reader(page_of(tmp_path, hostile(HOSTILE), sample=HOSTILE))
    assert "<script>window.hacked=1</script>" in reader.text  # seen, not run
    assert "{{7*7}}" in reader.text
    assert len([1 for attributes, _ in reader.scripts if "type" not in attributes]) == 2
    assert "img" not in {tag for tag, _ in reader.elements}
    assert reader.specs


@pytest.mark.usefixtures("stubbed")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30) | st.text("<>&'\"{}=/! -script", min_size=1))
def test_no_text_changes_what_elements_a_page_has(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    assert skeleton(tmp_path_factory.mktemp("run"), text) == harmless_skeleton(tmp_path_factory.getbasetemp())


def skeleton(directory: Path, text: str) -> list[str]:
    page = page_of(directory, hostile(f"x{text}"), sample=f"x{text}")
    return [tag for tag, _ in Reader(page).elements if tag != "b"]  # ratios in a headline are bold


@cache
def harmless_skeleton(directory: Path) -> list[str]:
    return skeleton(directory / "harmless", "plain")


@pytest.mark.usefixtures("stubbed")
def test_a_damaged_last_line_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, two_lives())
    with (run / "results.jsonl").open("a") as file:
        file.write('{"record": "row", "sche')
    assert main([str(run)]) == 0
    found = Reader((run / "report.html").read_text(encoding="utf-8")).text
    assert "The file is damaged:" in found and "left out" in found
    assert "Training this model costs" in found


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize("name", ["absent", "empty", "absent/results.jsonl"])
def test_a_run_that_is_not_there_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    assert f"error: {tmp_path / name}: no results.jsonl is there" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.usefixtures("stubbed")
def test_rows_of_a_schema_to_come_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, ladder())
    text = (run / "results.jsonl").read_text().replace('"schema": 2', '"schema": 99')
    (run / "results.jsonl").write_text(text)
    assert main([str(run)]) == 3
    assert "schema 99" in capsys.readouterr().err


@pytest.mark.usefixtures("stubbed")
def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ladder())
    (tmp_path / "taken").write_text("a file")
    assert main([str(run), "--output", str(tmp_path / "taken" / "report.html")]) == 5
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.usefixtures("stubbed")
def test_runs_of_one_place_stand_side_by_side_with_their_ratio(tmp_path: Path) -> None:
    one, other = run_of(tmp_path / "one", two_lives()), run_of(tmp_path / "two", two_lives(slower=2.0, compile=True))
    assert main([str(one), str(other), "--output", str(tmp_path / "both.html")]) == 0
    found = Reader((tmp_path / "both.html").read_text(encoding="utf-8")).text
    assert "one beside two" in found
    assert "compile True" in found  # what differs
    assert "÷ one" in found and "2.00x" in found
    assert "not compared" not in found


def elsewhere(records: list[Record]) -> list[Record]:
    place = replace(ENVIRONMENT, id="e2", identity={**ENVIRONMENT.identity, "cpu": "EPYC"})
    return [place if isinstance(r, Environment) else replace(r, environment="e2") for r in records]


@pytest.mark.usefixtures("stubbed")
def test_runs_of_unlike_places_stand_side_by_side_without_a_ratio(tmp_path: Path) -> None:
    one, other = run_of(tmp_path / "one", two_lives()), run_of(tmp_path / "two", elsewhere(two_lives(slower=7.0)))
    assert main([str(one), str(other), "--output", str(tmp_path / "both.html")]) == 0
    found = Reader((tmp_path / "both.html").read_text(encoding="utf-8")).text
    assert "two is not compared: the environments differ in cpu (Xeon and EPYC)" in found
    assert "7.00x" not in found


@pytest.mark.usefixtures("stubbed")
def test_runs_of_any_other_question_meet_row_by_row(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"low": None, "high": None, "interval": None}
    slower = [replace(r, value=2 * (r.value or 0), **bare) if isinstance(r, Row) else r for r in ladder()]
    one, other = run_of(tmp_path / "one", ladder()), run_of(tmp_path / "two", slower)
    assert main([str(one), str(other), "--output", str(tmp_path / "both.html")]) == 0
    found = Reader((tmp_path / "both.html").read_text(encoding="utf-8")).text
    assert "training, forward: time (rung=training mode) 29.0 ms" in found
    assert found.count("2.00x") == 3


@pytest.mark.usefixtures("stubbed")
def test_pictures_are_written_as_png(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", two_lives() + peaks())
    assert main([str(run), "--png", str(tmp_path / "png")]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    assert written.keys() == {f"{name}.png" for name in ("two_lives", "memory", "cache", "break_even", "roofline")}
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in written.values())


@pytest.mark.usefixtures("stubbed")
def test_no_name_in_a_file_leads_a_picture_out_of_its_directory(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [replace(r, experiment="../../escaped") for r in ladder() if isinstance(r, Row)])
    assert main([str(run), "--png", str(tmp_path / "png")]) == 0
    assert len(list((tmp_path / "png").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "png"}


@pytest.mark.usefixtures("stubbed")
def test_markdown_holds_sentence_and_table_and_escapes_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", two_lives())
    assert main([str(run), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("**Training this model costs ")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # one table
    assert any(line.startswith("| backward, a step | ") for line in lines)
    other = run_of(tmp_path / "other", hostile("a|b <img>\x1b[31m`"))
    assert main([str(other), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "<img>" not in re.sub(r"(?<!\\)`[^`]*`", "", text)
    assert "a\\|b &lt;img>" in text


def test_vega_is_bundled_once_and_again_where_what_was_kept_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = iter(["first", "second", "third"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "bundled", lambda: next(bundles))
    fresh = report.javascript.__wrapped__  # as in a process of its own
    assert (fresh(), fresh()) == ("first", "first")
    (kept,) = (tmp_path / "cache").rglob("*.js")
    kept.write_bytes(b"\xff")
    assert (fresh(), kept.read_text()) == ("second", "second")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file, in which nothing can be kept
    assert fresh() == "third"


def test_vega_and_jinja_are_paid_for_only_when_used() -> None:
    code = "import sys, isoforward.show.report; "
    code += "print(*{'vl_convert', 'jinja2', 'hydra', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_full_report_and_one_of_many_rows_stay_below_a_megabyte_and_a_half(tmp_path: Path) -> None:
    full = page_of(tmp_path / "full", two_lives() + peaks(), sample="O Romeo " * 10_000)
    assert 500_000 < len(full.encode()) < 1_500_000
    whole: dict[str, Any] = {"experiment": "sweep", "life": "training", "phase": "step", "per": "step"}
    quantities = ("time", "memory", "energy", "loss", "bytes")
    many: list[Record] = [
        Row(
            **whole,
            quantity=quantities[n % 5],
            value=n + 1.0,
            samples=(0.5,) * 30,
            conditions={"width": n, "kernel": f"k{n % 7}"},
        )
        for n in range(1000)
    ]
    page = page_of(tmp_path / "many", many)
    assert len(page.encode()) < 1_500_000
    assert "of 200 rows; results.jsonl holds all" in Reader(page).text
    rows = tuple(r for r in two_lives() if isinstance(r, Row))
    runs = [(f"run {n}", Results(rows=rows, environments={}, verdicts=(), warnings=())) for n in range(8)]
    several = write_report(runs, tmp_path / "several.html")
    assert several.stat().st_size < 1_500_000


DRAWN = (
    "document.readyState == 'complete' &&"
    " [...document.querySelectorAll('.chart')].every(chart => chart.querySelector('svg'))"
)


class ReportBrowser(Browser):
    def open(self, page: Path, *, width: int = 1280, ready: str = DRAWN, **preferences: str) -> None:
        super().open(page, width=width, ready=ready, **preferences)
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert chromium(), "this test looks at the report in a real browser: install chromium"
    browser = ReportBrowser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def real_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("real")
    page_of(directory, two_lives() + peaks() + ladder()[1:], sample="ROMEO: but soft")
    return directory / "report.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_everything_and_asks_nobody(
    browser: Browser, real_report: Path, width: int, scheme: str
) -> None:
    browser.open(real_report, width=width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requested() == [real_report.as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    charts = "[...document.querySelectorAll('.chart svg')].map"
    assert len(widths := browser.ask(f"{charts}(s => s.getBoundingClientRect().width)")) == 6
    assert all(0.8 * min(width - 40, 890) <= each <= width for each in widths)
    # Nothing that is drawn lies outside the picture, as it would where a picture had no room.
    outside = (
        "(s => { const box = s.getBoundingClientRect(); return [...s.querySelectorAll('text')].filter(t => { const b ="
        " t.getBoundingClientRect(); return b.width && (b.left < box.left - 2 || b.right > box.right + 2) }).length })"
    )
    assert browser.ask(f"{charts}{outside}") == [0] * 6
    bars = "document.querySelector('.chart svg').querySelectorAll('.mark-rect path[aria-label]').length"
    assert browser.ask(bars) == 7  # four phases and three ways to serve
    ink = "getComputedStyle(document.querySelector('.chart svg .mark-text.role-mark text')).fill"
    assert browser.ask(ink) == {"light": "rgb(27, 31, 36)", "dark": "rgb(233, 236, 239)"}[scheme]


@pytest.mark.slow
def test_a_browser_runs_nothing_that_a_file_says(browser: Browser, tmp_path: Path) -> None:
    page_of(tmp_path, hostile(HOSTILE), sample=HOSTILE)
    browser.open(tmp_path / "report.html", width=1200)
    assert browser.ask("String(window.hacked)") == "undefined"
    assert browser.requested() == [(tmp_path / "report.html").as_uri()]
    assert browser.complaints() == []
    place = browser.ask(
        "(point => { point.scrollIntoView(); const box = point.getBoundingClientRect();"
        " return {x: box.x + box.width / 2, y: box.y + box.height / 2} })"
        "(document.querySelector('.chart svg .mark-symbol.role-mark path'))"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    assert HOSTILE[:20] in browser.ask("document.querySelector('#vg-tooltip-element').textContent")
    assert browser.ask("document.querySelectorAll('img').length") == 0
    assert browser.ask("String(window.hacked)") == "undefined"


@pytest.mark.slow
def test_a_browser_would_not_run_a_script_even_if_one_slipped_in(browser: Browser, tmp_path: Path) -> None:
    page = page_of(tmp_path, ladder()).replace("</main>", "<script>window.hacked = 1</script></main>")
    (tmp_path / "broken.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "broken.html", width=1200)
    assert browser.ask("String(window.hacked)") == "undefined"
