"""One self-contained HTML file with a model in it, so that both its lives can be touched; it asks nothing of a network.

isoforward lesson runs/latest
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from isoforward.base.errors import BadInput, Refusal
from isoforward.base.results import Results, read
from isoforward.base.storage import write_atomically
from isoforward.lesson.answers import measured
from isoforward.lesson.packing import forward_of, packed_model, packed_tokenizer
from isoforward.serve.decoding import Pass
from isoforward.serve.inference import InferenceModule, find_export, load

LIMIT = 2_500_000  # bytes of a page: small enough for a mail to a class, and it opens at once
BITS = (16, 8)  # of a weight: the first that fits
HERE = Path(__file__).parent
SCRIPTS = (
    *(f"model/{name}.js" for name in ("tensor", "gpt", "steps", "weights", "tokenizer")),
    *(f"views/{name}.js" for name in ("dom", "picture", "forward", "generate", "train", "freeze", "guess", "main")),
)
PROMPTS = ("ROMEO:", "The ", "a")  # the first that the tokenizer can encode
SENTENCES = ("To be, or not to be: that is the question.", "One forward, two lives.", "a a")


def write_lesson(checkpoint: Path | str, output: Path | None = None) -> Path:
    """The lesson of a run, an export or a training checkpoint: lesson.html beside what was named, or `output`.

    BadInput where the model is too large for a page, or its tokenizer is of another kind than the page's.
    """
    refuse_large_file(find_export(checkpoint))
    home, results = beside(checkpoint)
    page = build_page(load(checkpoint), results, name=home.resolve().name)
    return write_page(page, output or home / "lesson.html")


def write_generation(
    module: InferenceModule, checkpoint: Path | str, prompt: str, passes: Sequence[Pass], output: Path
) -> Path:
    """One generation's passes, as they ran, with the lesson of the model that made it."""
    home, results = beside(checkpoint)
    generation = {"prompt": prompt, "tokens": recorded(passes)}
    return write_page(build_page(module, results, name=home.resolve().name, generation=generation), output)


def beside(checkpoint: Path | str) -> tuple[Path, Results | None]:
    """The directory of a run, an export or a checkpoint file, and the rows of its run."""
    home = Path(checkpoint)
    home = home if home.is_dir() else home.parent
    rows = next((place / "results.jsonl" for place in (home, home.parent) if (place / "results.jsonl").is_file()), None)
    return home, None if rows is None else read(rows)


def recorded(passes: Sequence[Pass]) -> list[dict[str, object]]:
    """A line for each token: the pass that gave it (a draft lets one give several), and its five likeliest tokens."""
    lines = []
    for number, step in enumerate(passes, 1):
        for place, (token, scores) in enumerate(zip(step.tokens, step.scores, strict=True)):
            likeliest = scores.float().softmax(-1).topk(min(5, len(scores)))
            top = list(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
            about = {"pass": number, "context": step.context, "time_s": step.time_s} if place == 0 else {"pass": None}
            lines.append(about | {"top": top, "chosen": token})
    return lines


def write_page(page: str, path: Path) -> Path:
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def refuse_large_file(export: Path) -> None:
    """Before a file of gigabytes is read: a weight takes four bytes at most, and a page one of them at least."""
    weights = export if export.is_file() else export / "model.safetensors"
    states = 3 if export.is_file() else 1  # a training checkpoint holds the optimizer's moments too
    if weights.is_file() and weights.stat().st_size / (4 * states) > LIMIT:
        raise too_large(weights.stat().st_size // (4 * states))


def too_large(size: float) -> BadInput:
    return BadInput(
        f"the lesson would take {size / 1e6:.1f} MB or more, and a page is {LIMIT / 1e6:.1f} MB at most: "
        "train a smaller model, such as model=tiny, or one with a smaller model.width, model.layers or data.vocab"
    )


def build_page(
    module: InferenceModule, results: Results | None, *, name: str, generation: Mapping[str, object] | None = None
) -> str:
    """The page as text. `generation` are the passes of one generation, which the page then shows first."""
    tokenizer, text = refuse_unpackable(module), json.loads((HERE / "text.json").read_text("utf-8"))
    told = {
        "name": name,
        "tokenizer": tokenizer,
        "measured": measured(results),
        "prompt": generation["prompt"] if generation else first_known(module, PROMPTS),
        "sentence": first_known(module, SENTENCES),
        "generation": generation,
        "text": text,
    }
    for bits in BITS:
        page = filled(told | {"model": packed_model(module.model, bits)}, [*text["noscript"].values()])
        if len(page.encode()) <= LIMIT:
            return page
    raise too_large(len(page.encode()))


def refuse_unpackable(module: InferenceModule) -> dict[str, object]:
    """BadInput, before any work, for a model that no page holds; what a page has of its tokenizer."""
    forward_of(module.model.config)
    tokenizer = packed_tokenizer(module.tokenizer)
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    if parameters > LIMIT:  # a byte each at least
        raise too_large(parameters)
    return tokenizer


def filled(told: Mapping[str, object], noscript: Sequence[str]) -> str:
    script = "\n".join((HERE / path).read_text("utf-8") for path in SCRIPTS)
    data = json.dumps(told, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    parts = {
        "hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        "style": (HERE / "style.css").read_text("utf-8").strip(),
        "noscript": " ".join(noscript),
        "data": data,
        "script": script,
    }
    before, *rest = (HERE / "page.html").read_text("utf-8").split("{{ ")
    page = [before]
    for piece in rest:  # each name once and in order: what is filled in is never read for names again
        key, after = piece.split(" }}", 1)
        page += [parts[key], after]
    return "".join(page)


def first_known(module: InferenceModule, texts: tuple[str, ...]) -> str:
    for text in texts:
        try:
            module.tokenizer.encode(text)
        except BadInput:
            continue
        return text
    return module.tokenizer.decode(range(min(8, module.tokenizer.vocabulary)))


ABOUT = "Writes both lives of a run's own model as one page, which needs no network: isoforward lesson runs/latest"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="isoforward lesson", description=ABOUT, allow_abbrev=False)
    parser.add_argument(
        "checkpoint", nargs="?", default="runs/latest", metavar="CHECKPOINT", help="a run, an export or a checkpoint"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="lesson.html beside the checkpoint if not given")
    asked = parser.parse_args(argv)
    try:
        print(write_lesson(asked.checkpoint, asked.output))
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
