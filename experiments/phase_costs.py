"""What does training add to the forward pass, and what does serving cost?

    python experiments/phase_costs.py checkpoint=runs/latest              of a trained model
    python experiments/phase_costs.py model=small                         of fresh weights of any model
    python experiments/phase_costs.py model=hf model.path=DIR             of a GPT-2 or Llama directory or GGUF
    python experiments/phase_costs.py model=transformers model.path=DIR   of any causal LM, as it is
    python experiments/phase_costs.py data.batch=4 data.length=128 precision=bf16

Measures every phase of training and of inference: forward, loss, backward, optimizer; the frozen forward on the same
batch, prefill, and decode with and without a KV cache. model=transformers wraps any causal LM without changing it.

:chapter: Start here
:unread: optim.min_lr optim.schedule optim.warmup_steps
"""

import sys

from rich.console import Console

from isoforward.app.command_line import run
from isoforward.app.question import at_most, case_of, wrapped_case
from isoforward.app.run_directory import claim
from isoforward.app.telling import command_line, conclude
from isoforward.base.config import ExperimentConfig
from isoforward.base.terminal import say
from isoforward.measure.both_lives import measure_both_lives


def main(config: ExperimentConfig) -> None:
    if config.checkpoint is None and config.model.source == "transformers":
        case = wrapped_case(config, "phase_costs")
    else:
        case = case_of(config, "phase_costs")
    console = Console()
    with claim(config) as run_dir:
        say(console, f"measuring both lives{at_most(config.measure)}")
        measure_both_lives(case, run_dir / "results.jsonl", command_line())
        conclude(config, run_dir, console, job_type="experiment")


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
