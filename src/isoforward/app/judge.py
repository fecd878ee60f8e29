"""`isoforward judge A B`: is A faster than B? It says so, or that they are equal, or that this was too noisy to tell.

Two commands run in pairs, one directly after the other, in an order that is drawn, each in a fresh process. Of two
results files, rows of the same work are held against each other, where several processes show how much those vary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isoforward.app.command_line import complain, explain, typed, writable
from isoforward.base import disturbance, units
from isoforward.base.config import MeasureConfig
from isoforward.base.disturbance import Reading
from isoforward.base.errors import BadInput, Refusal
from isoforward.base.results import Results, Row, only, refuse_unlike, select
from isoforward.base.statistics import Estimate, Interval, Judgement, judge, ratio_of
from isoforward.base.terminal import print_what_can_be_encoded
from isoforward.measure.benchmark import Part, Work, measure
from isoforward.measure.passes import end_live_line, live_line
from isoforward.measure.trust import findings, verdict
from isoforward.show.report import named

UNDECIDED = 10  # the exit code; 0 where it is decided
PAIRS = 7  # that the interval of the last look needs
SAMPLES = 6  # that the interval of the only look needs, where their number is fixed
KEYS = ("budget", "margin", "repeats")
EXPANDED = re.compile(r"[$`]")  # in double quotes, too
FOR_A_SHELL = re.compile(r"&&|\|\||[|&;<>$`]")
# Conditions that are the work itself; all others are ways to do it.
SIZES = ("parameters", "layers", "width", "heads", "vocab")
WORK = (*SIZES, "batch", "length", "tokens", "prompt", "new_tokens", "context", "cache", "head")

USAGE = """Says whether A is faster or slower than B, equal within a margin, or undecided.

A and B are two commands, each timed from start to end, quoted as one argument; or two runs (directories, or their
results.jsonl), each measured with measure.processes=3 or more.

  isoforward judge "python before.py" "python after.py" measure.budget=120
  isoforward judge runs/before runs/after phase=decode

keys, of commands: measure.budget (seconds, 60), measure.margin (what counts as equal, 0.03), measure.repeats (a fixed
number of pairs); of runs: measure.margin, and any field or condition of the row to judge (the training step).

exit codes: 0 decided, 10 undecided, 2 bad input, 130 stopped by Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """`reasons` say who disturbed; the order of pairs is drawn, so that the outcome holds all the same."""

    judgement: Judgement
    estimates: tuple[Estimate, Estimate]
    reasons: tuple[str, ...] = ()
    stopped: bool = False


def judge_commands(first: str, second: str, plan: MeasureConfig, *, seed: int = 0) -> Judged:
    runner = Commands()
    works = [runner.work("A", first), runner.work("B", second)]
    pair = (works[0].part, works[1].part)
    show = live_line("A and B")
    measured = measure(works, [pair], plan, seed=seed, show=show, look=runner.look, fewest=PAIRS)
    end_live_line()
    if not measured.blocks:
        raise Refusal("stopped before there were enough pairs for an interval")
    return Judged(
        judgement=measured.judgement(pair),
        estimates=(measured.estimate(pair[0]), measured.estimate(pair[1])),
        reasons=verdict("judge", [findings(measured)], plan).reasons,
        stopped=measured.stopped,
    )


class Commands:
    """Runs commands, and knows how long they waited for a processor, which their parent's counters leave out."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def look(self) -> Reading:
        reading = disturbance.look()
        own_s = reading.run_delay_s
        return dataclasses.replace(reading, run_delay_s=None if own_s is None else own_s + self.waited_s)

    def work(self, name: str, command: str) -> Work:
        words = words_of(name, command)
        part = Part(life="command", phase=name, per="run", conditions={})

        def run(n: int) -> Sequence[float]:
            start = time.perf_counter()
            for _ in range(n):
                self.execute(name, words)
            return ((time.perf_counter() - start) / n,)

        return Work(parts=(part,), run=run)

    def execute(self, name: str, words: Sequence[str]) -> None:
        quiet = subprocess.DEVNULL
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=said)
            except OSError as error:
                raise BadInput(f"{name}: {words[0]} cannot be run: {error.strerror}") from error
            try:
                with suppress(AttributeError, OSError):  # where the system cannot wait so
                    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is still there to be asked
                    self.waited_s += disturbance.run_delay_s(process.pid) or 0.0
                code = process.wait()
            finally:
                process.kill()
                process.wait()
            if code == -signal.SIGINT:
                raise KeyboardInterrupt
            if code:
                said.seek(0)
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
                because = f" ({last})" if last else ""
                raise BadInput(f"{name}: {shlex.join(words)} ended with code {code}{because}; only success is timed")


def words_of(name: str, command: str) -> list[str]:
    """As a shell cuts it; what a shell alone understands is refused, not handed on as text."""
    outside = re.sub(r"'[^']*'|\\.", "", command)  # of quotes within which everything is text
    signs = FOR_A_SHELL.findall(re.sub(r'"[^"]*"', lambda found: "".join(EXPANDED.findall(found[0])), outside))
    if signs:
        raise BadInput(f"{name}: {signs[0]} is for a shell, and none runs here; write sh -c {shlex.quote(command)}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BadInput(f"{name}: {command}: {str(error).lower()}") from error
    if not words:
        raise BadInput(f"{name} is empty; give a command or a run")
    return words


def judge_runs(first: Path, second: Path, wanted: dict[str, str], margin: float) -> Judged:
    (_, one), (_, other) = named([first, second])
    rows = time_in(one, wanted, first), time_in(other, wanted, second)
    refuse_unlike(one.place_of(rows[0]), other.place_of(rows[1]))
    unlike = [key for key in ("life", "phase", "per") if getattr(rows[0], key) != getattr(rows[1], key)]
    unlike += [key for key in WORK if rows[0].conditions.get(key) != rows[1].conditions.get(key)]
    if unlike:
        about = [dataclasses.asdict(row) | dict(row.conditions) for row in rows]
        shown = ", ".join(f"{key} ({about[0].get(key)} and {about[1].get(key)})" for key in unlike)
        raise BadInput(f"not the same work: {shown}; measure both runs with the same model and data")
    estimates = estimate_of(rows[0], first), estimate_of(rows[1], second)
    judgement = judge(ratio_of(*estimates), margin=margin)
    reasons = dataclasses.replace(one, verdicts=one.verdicts + other.verdicts).doubts
    return Judged(judgement=judgement, estimates=estimates, reasons=tuple(reasons))


def time_in(results: Results, wanted: dict[str, str], where: Path) -> Row:
    """The one time that is as `wanted`; the training step, or the only one, where nothing is."""
    times = select(results, quantity="time")
    if not times:
        raise BadInput(
            f"{where} has no times: nothing was measured in it; measure its model with phase_costs checkpoint={where}"
        )
    fields = Row.__dataclass_fields__
    for key, value in wanted.items():
        times = [r for r in times if str(getattr(r, key) if key in fields else r.conditions.get(key)) == value]
    if not wanted and len(times) > 1:
        times = select(times, life="training", phase="step") or times
    if not times:
        raise BadInput(f"{where} has no such time; it has {phases(select(results, quantity='time'))}")
    try:
        return only(times)
    except BadInput as several:
        raise BadInput(f"{where}: {several}; of {phases(times)}") from several


def phases(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(f"life={row.life} phase={row.phase}" for row in rows))


def estimate_of(row: Row, where: Path) -> Estimate:
    """As its row has it: across processes, which alone show how far two runs of the same thing are apart."""
    if row.value is None or row.low is None or row.high is None or row.interval != "across processes":
        raise BadInput(
            f"{where}: one process does not show how much processes vary, so that equals would differ; "
            "measure both runs with measure.processes=5, or judge two commands"
        )
    interval = Interval(low=row.low, high=row.high, kind=row.interval, confidence=row.confidence or 0.0)
    return Estimate(median=row.value, interval=interval, samples=tuple(float(sample) for sample in row.samples))


def sentence(judgement: Judgement) -> str:
    if judgement.differs:
        return f"A is {judgement.outcome} than B: its time is {judgement.sentence()} that of B."
    said = judgement.sentence()
    if judgement.outcome == "equal":
        return f"A and B are {said}: {judgement.ratio.low:.4g}x to {judgement.ratio.high:.4g}x."
    return f"{said[0].upper()}{said[1:]}."


def as_json(names: Sequence[str], judged: Judged) -> str:
    found, ratio = judged.judgement, judged.judgement.ratio
    about: dict[str, object] = {"outcome": found.outcome, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    about |= {"confidence": ratio.interval.confidence, "interval": ratio.interval.kind, "n": ratio.n}
    about |= {"margin": found.margin, "visible": found.visible, "needed_s": found.needed_s}
    about |= {"stopped": judged.stopped, "reasons": judged.reasons}
    for key, name, estimate in zip("ab", names, judged.estimates, strict=True):
        interval = estimate.interval
        about[key] = {"of": name, "time_s": estimate.median, "low": interval.low, "high": interval.high}
    return json.dumps(about)


def in_words(names: Sequence[str], judged: Judged) -> str:
    lines = []
    for letter, name, estimate in zip("AB", names, judged.estimates, strict=True):
        low, middle, high = (units.seconds(t) for t in (estimate.interval.low, estimate.median, estimate.interval.high))
        lines.append(f"{letter}  {middle} ({low} to {high}), n = {estimate.n}: {name}")
    lines += ["", sentence(judged.judgement), *(f"Beside it: {reason}." for reason in judged.reasons)]
    return "\n".join(lines)


def parsed(settings: Sequence[str]) -> tuple[MeasureConfig, dict[str, str]]:
    """The plan, and what else is asked for."""
    without = [setting for setting in settings if "=" not in setting]
    if without:
        raise BadInput(f"{without[0]} is neither A, B nor key=value; quote a command as one argument")
    own = [setting.removeprefix("measure.") for setting in settings if setting.startswith("measure.")]
    if strange := [setting for setting in own if setting.partition("=")[0] not in KEYS]:
        raise BadInput(f"measure.{strange[0]}: judge takes {', '.join(f'measure.{key}' for key in KEYS)}")
    repeats = dict(setting.split("=", 1) for setting in own).get("repeats", "")
    if repeats.isdecimal() and int(repeats) < SAMPLES:
        raise BadInput(f"measure.repeats={repeats} pairs give no interval; write measure.repeats={SAMPLES} or more")
    raw = writable(MeasureConfig)
    try:
        raw.merge_with(OmegaConf.from_dotlist(["budget=60", "precision=1", "warmup=1", *own]))
        plan = typed(raw, MeasureConfig)
    except OmegaConfBaseException as error:
        raise BadInput(f"measure.{explain(error, MeasureConfig)}") from error
    return plan, dict(s.split("=", 1) for s in settings if not s.startswith("measure."))


def judged(first: str, second: str, settings: Sequence[str]) -> Judged:
    plan, wanted = parsed(settings)
    runs = [(bool(one) and Path(one).is_dir()) or Path(one).suffix == ".jsonl" for one in (first, second)]
    if all(runs):
        if plan.repeats is not None:
            raise BadInput("measure.repeats: runs are measured already; leave this key out")
        return judge_runs(Path(first), Path(second), wanted, plan.margin)
    if any(runs):
        other = second if runs[0] else first
        if shutil.which(words_of("A" if runs[1] else "B", other)[0]) is None:
            raise BadInput(f"{other} does not exist, and is no command either")
        raise BadInput(f"{first} and {second}: one is a run, the other a command; give two of a kind")
    if wanted:
        raise BadInput(f"{next(iter(wanted))}: no such key; commands take {', '.join(f'measure.{k}' for k in KEYS)}")
    return judge_commands(first, second, plan)


def main(argv: Sequence[str] | None = None) -> int:
    print_what_can_be_encoded()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="isoforward judge", description=USAGE, formatter_class=formatter)
    parser.add_argument("first", metavar="A", help="a command, or a run")
    parser.add_argument("second", metavar="B", help="another of the same kind")
    parser.add_argument("settings", metavar="key=value", nargs="*").required = False
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of words")
    asked = parser.parse_intermixed_args(argv)
    names = (asked.first, asked.second)
    try:
        found = judged(*names, asked.settings)
    except Refusal as refusal:
        return complain(refusal)
    except KeyboardInterrupt:
        return 130
    print(as_json(names, found) if asked.json else in_words(names, found))
    if found.stopped:
        return 130
    return UNDECIDED if found.judgement.outcome == "undecided" else 0


if __name__ == "__main__":
    sys.exit(main())
