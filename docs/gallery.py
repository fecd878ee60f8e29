"""What is generated of the questions: the gallery with its pictures, and the tables of README.md and docs/questions.md.

    python docs/gallery.py                  writes all of them anew, as `make gallery` does
    python docs/gallery.py RUN [RUN ...]    records these runs first, each under its directory's name less `gallery_`

The questions are the first lines of the files in experiments/. experiments/README.md shows what docs/recorded holds:
the rows of a run and its answer. Pictures are SVG, drawn from those rows by Vega-Lite, which needs no browser.
"""

import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from isoforward.app.scripts import Script, questions
from isoforward.base.results import Results, Row, Verdict, at_most_one, only, read, select
from isoforward.show.report import view

ROOT = Path(__file__).resolve().parent.parent
RECORDED, PICTURES, PAGE = ROOT / "docs" / "recorded", ROOT / "docs" / "pictures", ROOT / "experiments" / "README.md"
KEPT = ("results.jsonl", "answer.txt")
TABLES = (ROOT / "README.md", ROOT / "docs" / "questions.md")
MISMATCH = ROOT / "docs" / "mismatch.md"
ENGINES = {"mismatch_vllm": "vLLM 0.32 on a CPU", "mismatch_llama": "llama.cpp's server on a CPU"}
OPENING = """\
# Questions, and what one machine answered

Every answer, picture and verdict below is made from the rows of a recorded run, kept in `docs/recorded`; `make gallery`
makes this page from them. A verdict is the run's own: the machine is a shared one, and a run that was disturbed says
so.
"""


def record(run: Path) -> None:
    target = RECORDED / run.resolve().name.removeprefix("gallery_")
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(run / name, target / name)


def table() -> str:
    rows: list[tuple[str, str]] = []
    for question in questions():
        if question.chapter not in {chapter for chapter, _ in rows}:
            rows.append((question.chapter, f"| **{question.chapter}** | |"))
        rows.append((question.chapter, f"| {question.about} | `{question.name}` |"))
    return "\n".join(["| question | |", "|---|---|", *(row for _, row in rows)])


def with_table(text: str, name: str, table: str) -> str:
    """The text of a page with one of its tables written anew."""
    return re.sub(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- end of {name} -->)", lambda _: table, text, flags=re.S)


def ways_table(recorded: dict[str, Results]) -> str:
    """How far each way of serving is from training, in fp32 and in bf16."""
    fp32, bf16 = recorded["mismatch_vllm"], recorded["mismatch_bf16"]
    rows = ["| served by | fp32: largest difference | bf16: largest difference | bf16: importance ratio |"]
    rows.append("|---|---|---|---|")
    for row in select(fp32, quantity="difference", statistic="largest"):
        if (way := row.conditions["way"]) != "endpoint":
            at = {"way": way, "batch": row.conditions["batch"]}
            told = [
                nats(only(run, quantity="difference", statistic="largest", **at))
                for run in (fp32, bf16)
                if at_most_one(run, quantity="difference", statistic="largest", **at)
            ]
            ends = [
                at_most_one(bf16, quantity="importance ratio", statistic=end, **at) for end in ("smallest", "largest")
            ]
            ratio = " to ".join(f"{end.number:.3f}" for end in ends if end)
            rows.append(f"| {way}, batch {at['batch']} | {' | '.join(told + [''] * (2 - len(told)))} | {ratio} |")
    for name, engine in ENGINES.items():
        served = only(recorded[name], quantity="difference", statistic="largest", way="endpoint")
        rows.append(f"| {engine} | {nats(served)} | | |")
    return "\n".join(rows)


def nats(row: Row) -> str:
    return "unavailable" if row.value is None else f"{row.value:.1e}" if row.value else "0"


def draw(name: str, results: Results) -> None:
    charts = [section.chart for section in view(name, results).sections if section.chart]
    # neither the proof before the answer nor, if there is another, a picture of some of its rows only
    proof = ("Identity", "Difference")
    chart = min(charts, key=lambda chart: (chart.title.startswith(proof), "the first" in chart.title))
    (PICTURES / f"{name}.svg").write_text(chart.svg(), "utf-8")


def machine(results: Results) -> str:
    place = next(iter(results.environments.values()))
    cores = f"{place.identity['threads']} threads on {place.identity['processors']} cores"
    return f"{place.identity['gpu'] or place.identity['cpu']}, {cores}, torch {place.identity['torch']}"


def measured(results: Results) -> bool:
    return any(row.provenance == "measured" for row in results.rows)


def judged(verdicts: Sequence[Verdict]) -> str:
    """The reasons of one verdict; of several, how many give each kind of reason."""
    doubted = [verdict for verdict in verdicts if verdict.reasons]
    if not doubted:
        return "these numbers can be trusted"
    if len(verdicts) == 1:
        return f"take these numbers with care: {'; '.join(verdicts[0].reasons)}"
    kinds = Counter(kind for verdict in doubted for kind in dict.fromkeys(r.partition(":")[0] for r in verdict.reasons))
    told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return f"take these numbers with care: {len(doubted)} of {len(verdicts)} measurements were disturbed ({told})"


def entry(name: str, results: Results, asked: Script) -> str:
    place = next(iter(results.environments.values()))
    subject = name.removeprefix(asked.name).strip("_")
    how = "predicted: nothing was measured"
    if measured(results):
        how = f"{machine(results)}: {judged(results.verdicts)}"
    parts = [
        f"### {asked.about}{f' ({subject})' if subject else ''}",
        wrapped((RECORDED / name / "answer.txt").read_text("utf-8")),
        f"![{asked.about}](../docs/pictures/{name}.svg)",
        f"```\n{place.command}\n```",
        wrapped(f"*{place.created[:10]}, {how}.*"),
    ]
    return "\n\n".join(parts)


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def page(recorded: dict[str, Results]) -> str:
    parts = [OPENING]
    for question in questions():
        if f"## {question.chapter}\n" not in parts:
            parts.append(f"## {question.chapter}\n")
        for name, results in recorded.items():
            if results.rows[0].experiment == question.name:
                parts.append(f"{entry(name, results, question)}\n")
    return "\n".join(parts)


def write_pages() -> dict[str, bool]:
    """Gallery, pictures and tables; gives whether each recorded run that measured something is trusted."""
    recorded = {path.name: read(path / "results.jsonl") for path in sorted(RECORDED.iterdir())}
    for name, results in recorded.items():
        draw(name, results)
    PAGE.write_text(page(recorded), "utf-8")
    for path in TABLES:
        path.write_text(with_table(path.read_text("utf-8"), "questions", table()), "utf-8")
    MISMATCH.write_text(with_table(MISMATCH.read_text("utf-8"), "ways", ways_table(recorded)), "utf-8")
    return {
        name: all(verdict.trusted for verdict in results.verdicts)
        for name, results in recorded.items()
        if measured(results)
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        record(Path(argument))
    write_pages()
