"""experiments/README.md and its pictures, made from the rows of recorded runs.

python docs/gallery.py RUN [RUN ...]    records these runs, each under its directory's name less `gallery_`
python docs/gallery.py                  makes page and pictures again from what is recorded
"""

import ast
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from isoforward.base.results import Results, Verdict, read
from isoforward.show.report import view

ROOT = Path(__file__).resolve().parent.parent
RECORDED, PICTURES, PAGE = ROOT / "docs" / "recorded", ROOT / "docs" / "pictures", ROOT / "experiments" / "README.md"
KEPT = ("results.jsonl", "answer.txt")
CHAPTERS = {
    "Both lives": (
        "phase_costs",
        "phase_costs_smollm2",
        "cost_ladder",
        "layers",
        "memory",
        "cast_tax",
        "one_knob",
        "one_knob_compile",
        "peers",
        "peers_bf16",
    ),
    "Serving": ("kv_cache", "decode_batch", "precision", "speculate"),
    "Training": (
        "throughput",
        "speedrun",
        "optimizers",
        "checkpointing",
        "accumulation",
        "distributed",
    ),
    "Planning": ("break_even", "scaling", "calibrate", "predict"),
    "Trust": ("self_check", "saving"),
}
OPENING = """\
# Questions, and what one machine answered

Every answer, picture and verdict below is made of the rows of a recorded run, which are kept in `docs/recorded`;
`python docs/gallery.py` makes this page from them. A verdict is the run's own: the machine is a shared one, and a run
that was disturbed says so.
"""


def record(run: Path) -> None:
    target = RECORDED / run.resolve().name.removeprefix("gallery_")
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(run / name, target / name)


def question(experiment: str) -> str:
    docstring = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{experiment}.py").read_text("utf-8")))
    return " ".join((docstring or "").split("\n\n")[0].split())


def picture(name: str, results: Results) -> Path | None:
    charts = [section.chart for section in view(name, results).sections if section.chart]
    if not charts:
        return None
    # neither the proof before the answer nor, if there is another, a picture of some of its rows only
    proof = ("Identity", "Difference")
    chart = min(charts, key=lambda chart: (chart.title.startswith(proof), "the first" in chart.title))
    path = PICTURES / f"{name}.png"
    path.write_bytes(chart.png())
    return path


def machine(results: Results) -> str:
    place = next(iter(results.environments.values()))
    cores = f"{place.identity['threads']} threads on {place.identity['processors']} cores"
    return f"{place.identity['gpu'] or place.identity['cpu']}, {cores}, torch {place.identity['torch']}"


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


def entry(name: str) -> str:
    results = read(RECORDED / name / "results.jsonl")
    place = next(iter(results.environments.values()))
    experiment = results.rows[0].experiment
    asked = question(experiment)
    subject = name.removeprefix(experiment).strip("_")
    measured = any(row.provenance == "measured" for row in results.rows)
    how = judged(results.verdicts) if measured else "predicted: nothing was measured"
    shown = picture(name, results)
    parts = [
        f"### {asked}{f' ({subject})' if subject else ''}",
        wrapped((RECORDED / name / "answer.txt").read_text("utf-8")),
        f"![{asked}](../docs/pictures/{shown.name})" if shown else "",
        f"```\n{place.command}\n```",
        wrapped(f"*{place.created[:10]}, {machine(results)}: {how}.*"),
    ]
    return "\n\n".join(filter(None, parts))


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def page() -> str:
    parts = [OPENING]
    for chapter, names in CHAPTERS.items():
        parts.append(f"## {chapter}\n")
        parts += [f"{entry(name)}\n" for name in names if (RECORDED / name).is_dir()]
    return "\n".join(parts)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        record(Path(argument))
    PAGE.write_text(page(), "utf-8")
