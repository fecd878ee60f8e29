"""Records the gallery anew: every run that it shows, one after another, on a machine with nothing else running.

    python docs/record.py                   all that runs/record does not hold yet, about an hour on two cores
    python docs/record.py peers speedrun    these alone

Each run is runs/record/NAME, whose rows go to docs/recorded. Broken off, it goes on with the next run; to record all of
them anew, remove runs/record. What is measured is measured in several fresh processes, so that intervals hold what
varies between them. Calibration goes first, and the model that the questions are asked of is what `python train.py`
trains. The runs that need a server (`serving`, `mismatch` of an endpoint) are made by hand: docs/serve.md starts one.
"""

import subprocess
import sys
import time
from pathlib import Path

from gallery import ROOT, record, write_pages

from isoforward.base.storage import DONE

RUNS = ROOT / "runs" / "record"
TRAINED, DRAFT = "checkpoint=runs/record/train", "draft=runs/record/draft"
PLAIN = ["tracking=none"]


def precisely(budget_s: int, *, processes: int = 16) -> list[str]:
    """So many seconds of timing in each process; each time to 10 %, what differs between processes included.

    A long look at one process does not say how the next one differs: many short ones know more for the same time.
    """
    return [f"measure.processes={processes}", f"measure.budget={budget_s}", "measure.precision=0.1", *PLAIN]


GPT2 = ["model=gpt2", "model.context=1040", "data.batch=1", "data.length=128", "measure.prompt=128"]
MODELS = {  # not shown themselves
    "train": ["train.py", *PLAIN],
    "draft": ["train.py", "model.layers=1", "model.heads=2", "model.width=64", "measure=none", *PLAIN],
}
QUESTIONS = {
    "calibrate": ["calibrate", *PLAIN],
    "phase_costs": ["phase_costs", TRAINED, *precisely(5)],
    "cast_tax": ["cast_tax", *precisely(5)],
    "cost_ladder": ["cost_ladder", TRAINED, *precisely(5)],
    "layers": ["layers", TRAINED, *precisely(5)],
    "memory": ["memory", "data.batch=8", *PLAIN],
    "one_knob": ["one_knob", TRAINED, *precisely(5)],
    "one_knob_compile": ["one_knob", "knob=compile", "values=[false,true]", TRAINED, *precisely(5)],
    "peers": ["peers", *GPT2, "compile=true", "precision=fp32", *precisely(8)],
    "peers_bf16": ["peers", *GPT2, "compile=true", "precision=bf16", *precisely(8)],
    "decode_batch": ["decode_batch", "model=gpt2", *precisely(5)],
    "kv_cache": ["kv_cache", *precisely(5)],
    "precision": ["precision", TRAINED, *precisely(5)],
    "speculate": ["speculate", TRAINED, DRAFT, "draft_tokens=[1,2,4]", *precisely(5)],
    "accumulation": ["accumulation", *precisely(5)],
    "checkpointing": ["checkpointing", *precisely(5)],
    "distributed": ["distributed", *PLAIN],
    "optimizers": ["optimizers", *precisely(5)],
    "speedrun": ["speedrun", *PLAIN],
    "speedrun_bits": ["speedrun", "track=bits", *PLAIN],
    "throughput": ["throughput", *precisely(5)],
    "adapters": ["adapters", *precisely(6, processes=8)],
    "rl_step": ["rl_step", *precisely(40, processes=3)],
    "attach_overhead": ["attach_overhead", "measure.margin=0.01", *precisely(16, processes=14)],
    "break_even": ["break_even", "model=llama3_8b", "hardware=h100", "tokens=15e12", "price_per_hour=2.5", *PLAIN],
    "plan": ["plan", "model=llama3_8b", "hardware=a100", "batch=2", "length=1024", "price_per_hour=2", *PLAIN],
    "lifetime": ["lifetime", "like=13e9", "price_per_hour=2", *PLAIN],
    "fits": ["fits", *PLAIN],
    "predict": ["predict", *PLAIN],
    "scaling": ["scaling", *PLAIN],
    "mismatch": ["mismatch", TRAINED, "precision=fp32", *precisely(6)],
    "mismatch_bf16": ["mismatch", TRAINED, "precision=bf16", *precisely(6)],
    "saving": ["saving", *PLAIN],
    "self_check": ["self_check", "rounds=40", *PLAIN],
}


def run(name: str, script: str, *arguments: str) -> Path | None:
    """The run's directory; None where it failed, which its log says more of."""
    directory = RUNS / name
    path = script if script.endswith(".py") else f"experiments/{script}.py"
    command = [sys.executable, path, *arguments, f"run_dir={directory.relative_to(ROOT)}"]
    RUNS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (RUNS / f"{name}.log").open("wb") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    told = (RUNS / f"{name}.log").read_text("utf-8", "replace").strip().splitlines()
    ended = "done" if code == 0 else f"failed: {told[-1] if told else f'code {code}'}"
    print(f"{name:20} {time.monotonic() - began:5.0f} s  {ended}", flush=True)
    return directory if code == 0 else None


def main(wanted: list[str]) -> int:
    if unknown := set(wanted) - QUESTIONS.keys():
        print(f"error: {', '.join(sorted(unknown))}: not recorded; {', '.join(QUESTIONS)} are", file=sys.stderr)
        return 2
    asked = {name: QUESTIONS[name] for name in wanted or QUESTIONS}
    models = {
        name: MODELS[name] for name in MODELS if any(f"/{name}" in one for each in asked.values() for one in each)
    }
    failed = []
    for name, (script, *arguments) in (models | asked).items():
        if (RUNS / name / DONE).is_file():
            continue
        directory = run(name, script, *arguments)
        if directory is None:
            failed.append(name)
        elif name in QUESTIONS:
            record(directory)
    trusted = write_pages()
    print(f"{sum(trusted.values())} of {len(trusted)} recorded answers are trusted; not: ", end="")
    print(", ".join(name for name, good in trusted.items() if not good) or "none")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
