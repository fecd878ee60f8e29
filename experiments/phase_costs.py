"""What does training add to the forward pass, and what does serving cost?

Measures every phase of both lives of one model: forward, loss, backward, optimizer; the frozen forward on the same
batch, prefill, and decode with and without a KV cache. `model=transformers` wraps any causal LM as it is.
"""

import sys

from rich.console import Console

from isoforward.app.command_line import claim, run
from isoforward.app.question import case_of, command_line, conclude, wrapped_case
from isoforward.base.config import ExperimentConfig
from isoforward.measure.train_and_serve import measure_both_lives
from isoforward.measure.transformers_lives import measure_wrapped_lives


def main(config: ExperimentConfig) -> None:
    if config.checkpoint is None and config.model.source == "transformers":
        case, measure = wrapped_case(config, "phase_costs"), measure_wrapped_lives
    else:
        case, measure = case_of(config, "phase_costs"), measure_both_lives
    console = Console()
    with claim(config) as run_dir:
        with console.status("measuring both lives"):
            measure(case, run_dir / "results.jsonl", command_line())
        conclude(config, run_dir, console, job_type="experiment")


if __name__ == "__main__":
    sys.exit(run(main, "phase_costs", ExperimentConfig))
