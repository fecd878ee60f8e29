"""A question's measuring in processes of its own, and what several of them tell together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import pytest

from isoforward.base.config import MeasureConfig
from isoforward.base.disturbance import Disturbance
from isoforward.base.errors import Stopped
from isoforward.base.results import Row, only, read
from isoforward.measure.benchmark import Measured, Progress, Work
from isoforward.measure.case import Case
from isoforward.measure.passes import Bench, derived, live_line, measure_apart
from tests.measure.cases import SMALL

CASE = replace(SMALL, threads=1, measure=MeasureConfig(repeats=6, warmup=1, processes=3))

pytestmark = pytest.mark.usefixtures("processes_start_at_once")


def planted(case: Case, log: str) -> Bench:
    """Each process is its own number of seconds slower: 1, 2 and 3 of a step, twice that of a forward."""
    with Path(log).open("a") as file:
        file.write("process\n")
    number = float(len(Path(log).read_text().splitlines()))
    step, forward = case.step("step"), case.step("forward")

    def taking(time_s: float) -> Callable[[int], Sequence[float]]:
        def run(n: int) -> Sequence[float]:
            return (time_s,)

        return run

    works = [Work(parts=(step,), run=taking(number)), Work(parts=(forward,), run=taking(2 * number))]

    def rows(measured: Measured) -> list[Row]:
        return [derived(case, case.step("residual"), [number] * 6)]

    return Bench(works=works, pairs=[(step, forward)], rows=rows)


def test_what_varies_between_processes_is_in_every_interval(tmp_path: Path) -> None:
    results, log = tmp_path / "results.jsonl", tmp_path / "log"
    measure_apart(CASE, planted, str(log), results=results, command="x")
    found = read(results)
    for phase, times_s in {"step": [1, 2, 3], "forward": [2, 4, 6], "residual": [1, 2, 3]}.items():
        row = only(found, phase=phase, quantity="time")
        assert row.value == pytest.approx(fmean(times_s))
        assert row.interval == "across processes"
        assert row.low is not None and row.high is not None
        assert row.low < min(times_s) and row.high > max(times_s)  # Student's t of three, with two degrees of freedom
        assert sorted(set(row.samples)) == sorted(float(time_s) for time_s in times_s)
        assert median(row.samples) == row.value
    (verdict,) = found.verdicts
    missed = "2 of 2 times are known less precisely than 5%"  # processes differ by half
    assert any(reason.startswith(missed) for reason in verdict.reasons)
    judged = found.judge(only(found, phase="step", quantity="time"), only(found, phase="forward", quantity="time"))
    assert judged.ratio.value == pytest.approx(0.5)


def test_one_process_tells_of_itself_alone(tmp_path: Path) -> None:
    results, log = tmp_path / "results.jsonl", tmp_path / "log"
    alone = replace(CASE, measure=MeasureConfig(repeats=6, warmup=1))
    measure_apart(alone, planted, str(log), results=results, command="x")
    assert log.read_text() == "process\n"
    assert only(read(results), phase="residual", quantity="time").interval != "across processes"


def interrupted(case: Case) -> Bench:
    """By Ctrl-C in the middle of its samples."""
    taken = 0

    def run(n: int) -> Sequence[float]:
        nonlocal taken
        taken += 1
        if taken == 20:
            raise KeyboardInterrupt
        return (1.0,)

    return Bench(works=[Work(parts=(case.step("step"),), run=run)])


def test_ctrl_c_keeps_the_rows_and_starts_no_further_process(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    plan = MeasureConfig(repeats=40, warmup=1, processes=3)
    with pytest.raises(Stopped, match="has what was measured until then"):
        measure_apart(replace(CASE, measure=plan), interrupted, results=results, command="x")
    found = read(results)
    assert 5 <= len(only(found, phase="step", quantity="time").samples) < 40
    assert found.verdicts[0].reasons[0].startswith("stopped early by Ctrl-C")


def interrupted_late(case: Case, log: str, last: int) -> Bench:
    """By Ctrl-C in the process of that number."""
    number = len(Path(log).read_text().splitlines()) + 1 if Path(log).exists() else 1
    with Path(log).open("a") as file:
        file.write("process\n")
    if number == last:
        return interrupted(case)
    return Bench(works=[Work(parts=(case.step("step"),), run=lambda n: (float(number),))])


@pytest.mark.parametrize(("last", "kept"), [(2, [1]), (3, [1]), (4, [1, 2, 3]), (5, [1, 2, 3, 4])])
def test_ctrl_c_in_a_later_process_keeps_those_that_were_done(tmp_path: Path, last: int, kept: list[int]) -> None:
    results, log = tmp_path / "results.jsonl", tmp_path / "log"
    plan = MeasureConfig(repeats=40, warmup=1, processes=6)
    with pytest.raises(Stopped):
        measure_apart(replace(CASE, measure=plan), interrupted_late, str(log), last, results=results, command="x")
    assert len(log.read_text().splitlines()) == last
    found = read(results)
    step = only(found, phase="step", quantity="time")
    assert sorted(set(step.samples)) == kept
    assert (step.interval == "across processes") == (len(kept) > 1)
    assert found.verdicts[0].reasons[0].startswith("stopped early by Ctrl-C")


def test_the_live_line_says_what_how_precisely_who_disturbs_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    show = live_line("peers")
    assert show is not None
    over = Disturbance(elapsed_s=10.0, run_delay_s=4.0, others_s=9.0)
    progress = Progress(known=3, asked=8, worst=0.071, left_s=12.3, disturbance=over, busiest=("ffmpeg", 8.0))
    told = (
        "measuring peers: 3 of 8 known, the others to 7.1%, other processes (mostly ffmpeg) took 40%, at most 12 s more"
    )
    for columns in (200, 80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        show(progress)
        assert capsys.readouterr().err == f"\r\x1b[K{told[: columns - 1]}"
    show(replace(progress, disturbance=Disturbance(elapsed_s=10.0), worst=None, left_s=0.0))
    assert capsys.readouterr().err == "\r\x1b[Kmeasuring peers: 3 of 8 known"


def test_there_is_no_live_line_where_there_is_no_terminal() -> None:
    assert live_line("peers") is None
