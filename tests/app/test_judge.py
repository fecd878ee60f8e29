"""Faster, slower, equal or undecided: on planted times, on small real commands, and on rows of runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from isoforward.app import judge
from isoforward.base.config import MeasureConfig
from isoforward.base.disturbance import Reading
from isoforward.base.errors import BadInput
from isoforward.base.results import Environment, Row, write
from isoforward.base.statistics import summarise
from isoforward.measure.passes import fields

PYTHON = sys.executable
PLACE = Environment(id="here", command="x", created="2026-01-01T00:00:00+00:00", identity={"cpu": "a"}, details={})


class Simulated(judge.Commands):
    """Commands are their own seconds, on a machine that adds 5 % of noise and has a sudden change of mood."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw, self.now_s, self.ran = random.Random(seed), 0.0, itertools.count()

    def execute(self, name: str, words: object) -> None:
        (time_s,) = map(float, words)  # type: ignore[call-overload]  # one word
        slower = 1.5 if next(self.ran) > 60 else 1.0
        self.now_s += time_s * slower * self.draw.lognormvariate(0, 0.05)

    def look(self) -> Reading:
        """The machine that the test runs on takes nothing again."""
        return Reading(time_s=self.now_s, run_delay_s=None, stolen_s=None, busy_s=None, own_s=0.0, throttled=None)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    runners: list[Simulated] = []

    def commands() -> Simulated:
        runners.append(Simulated(seed=len(runners)))
        return runners[-1]

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return runners[-1].now_s

    monkeypatch.setattr(judge, "Commands", commands)
    monkeypatch.setattr(judge, "time", Clock)
    yield


@pytest.mark.usefixtures("simulate")
def test_equals_differ_no_more_often_than_stated_and_a_planted_difference_is_found() -> None:
    plan = MeasureConfig(repeats=80, precision=1.0, warmup=1)
    found: Counter[tuple[str, str]] = Counter()
    for seed, second in itertools.product(range(200), ("1.0", "1.06")):
        outcome = judge.judge_commands("1.0", second, plan, seed=seed).judgement.outcome
        found[second, "differs" if outcome in ("faster", "slower") else outcome] += 1
    assert found["1.0", "differs"] <= 18  # of 200 at 5 %: more than that comes once in 100 such tests
    assert found["1.0", "equal"] >= 150
    assert found["1.06", "differs"] >= 190


def test_real_commands_are_timed_and_the_code_says_whether_it_is_decided(capsys: pytest.CaptureFixture[str]) -> None:
    code = judge.main([f"{PYTHON} -c 'import time; time.sleep(.3)'", f"{PYTHON} -c pass", "measure.repeats=8"])
    assert code == 0
    assert "A is slower than B: its time is" in capsys.readouterr().out
    assert judge.main(["true", "true", "measure.repeats=6", "--json"]) in (0, judge.UNDECIDED)
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == 6 and told["low"] <= told["ratio"] <= told["high"]
    assert told["a"]["of"] == "true"


def test_what_a_command_waited_for_a_processor_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = judge.Commands()
    before = runner.look()
    if before.run_delay_s is None:
        pytest.skip("this system does not tell")
    runner.execute("A", [PYTHON, "-c", "sum(range(10**6))"])
    assert runner.waited_s > 0  # the wait from its start to its first turn at least


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nosuch", "true"], "A: nosuch cannot be run: No such file"),
        (["true", "false"], "B: false ended with code 1; only success is timed"),
        (["", "true"], "A is empty"),
        (["/tmp", "/no/such/run"], "/no/such/run does not exist, and is no command"),
        (["no-such-run", "/tmp"], "no-such-run does not exist, and is no command"),
        (["/tmp", "true"], "one is a run, the other a command"),
        (["true", "true", "phase=step"], "phase: no such key"),
        (["true", "true", "x"], "quote a command as one argument"),
        (["true", "true", "measure.bugdet=3"], "judge takes measure.budget"),
        (["true", "true", "measure.budget=x"], "measure.budget: "),
        (["true", "true", "measure.margin=0"], "measure.margin=0.0 must lie"),
        (["true", "true", "measure.repeats=3"], "write measure.repeats=6 or more"),
        (["true", "true", "measure.repeats=5"], "write measure.repeats=6 or more"),
        (["cd /tmp && true", "true"], "A: && is for a shell, and none runs here; write sh -c 'cd /tmp && true'"),
        (["true", "echo a > b"], "B: > is for a shell"),
        (["true", "echo a|cat"], "B: | is for a shell"),
        (["true", 'echo "$HOME"'], "B: $ is for a shell"),
        (["true", "echo 'a"], "B: echo 'a: no closing quotation"),
        (["sleep 0.1", "sleep 0.1", "measure.budget=1"], "measure.budget=1 has no room for 7 samples of each"),
    ],
)
def test_bad_input_names_the_way_out(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge.main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text", ["python -c 'print(1 > 0); $x'", 'python -c "a = 1; b & a | c"', r"echo \$HOME a=b"])
def test_what_stands_in_quotes_is_text(text: str) -> None:
    assert judge.words_of("A", text) == shlex.split(text)


def run(where: Path, time_s: float, *, place: Environment = PLACE, interval: str = "across processes") -> Path:
    """A training step, and a decode that takes a hundredth of it."""
    rows: list[Row | Environment] = [place]
    for life, phase, scale in (("training", "step", 1.0), ("inference", "decode", 0.01)):
        found = fields(summarise([scale * time_s * (1 + 0.001 * n) for n in range(-6, 7)])) | {"interval": interval}
        conditions = {"width": 64, "compile": time_s > 1}
        row = Row(
            experiment="x",
            life=life,
            phase=phase,
            quantity="time",
            per="step",
            value=None,
            provenance="unavailable",
            reason="-",
        )
        rows.append(
            dataclasses.replace(
                row, provenance="measured", reason=None, conditions=conditions, environment=place.id, **found
            )
        )
    write(where / "results.jsonl", rows)
    return where


def test_runs_of_the_same_work_are_judged_by_the_step_or_what_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = str(run(tmp_path / "a", 1.1)), str(run(tmp_path / "b", 1.0))
    assert judge.main([one, other]) == 0
    assert "A is slower than B: its time is 1.10" in capsys.readouterr().out
    assert judge.main([one, other, "phase=decode"]) == 0
    assert "11.0 ms" in capsys.readouterr().out
    assert judge.main([one, one]) == 0
    assert "equal within 3 %" in capsys.readouterr().out
    assert judge.main([one, one, "measure.margin=0.001"]) == judge.UNDECIDED
    assert judge.main([one, other, "phase=backward"]) == 2
    assert "it has life=training phase=step, life=inference phase=decode" in capsys.readouterr().err


def test_unlike_places_unlike_work_and_single_processes_are_refused(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", 1.0), tmp_path / "b"
    elsewhere = dataclasses.replace(PLACE, identity={"cpu": "b"})
    with pytest.raises(BadInput, match=r"environments differ in cpu \(a and b\)"):
        judge.judge_runs(one, run(other, 1.0, place=elsewhere), {}, 0.03)
    with pytest.raises(BadInput, match=r"not the same work: life \(training and inference\), phase"):
        judge.judge_runs(one, other_phase(tmp_path / "c"), {}, 0.03)
    with pytest.raises(BadInput, match=r"measure\.processes=5"):
        judge.judge_runs(one, run(tmp_path / "d", 1.0, interval="order statistics"), {}, 0.03)


def test_a_run_without_times_is_said_to_have_none(tmp_path: Path) -> None:
    one, empty = run(tmp_path / "a", 1.0), tmp_path / "b"
    write(empty / "results.jsonl", [PLACE])
    with pytest.raises(BadInput, match="has no times: nothing was measured in it; measure its model with phase_costs"):
        judge.judge_runs(one, empty, {}, 0.03)


def other_phase(where: Path) -> Path:
    whole = run(where, 1.0) / "results.jsonl"
    lines = [line for line in whole.read_text().splitlines() if '"step", "quantity"' not in line]
    whole.write_text("\n".join(lines) + "\n")
    return where
