"""What does training add to the forward pass, and what does serving cost?

Measures every phase of both lives of one model: forward, loss, backward, optimizer; the frozen forward on the same
batch, prefill, and decode with and without a KV cache.
"""

import sys

from rich.console import Console

from isoforward.both_lives import measure_both_lives
from isoforward.config import ExperimentConfig
from isoforward.entry import claim, run
from isoforward.experiment import case_of, command_line, conclude


def main(config: ExperimentConfig) -> None:
    case = case_of(config, "phase_costs")
    console = Console()
    with claim(config) as run_dir:
        with console.status("measuring both lives"):
            measure_both_lives(case, run_dir / "results.jsonl", command_line())
        conclude(config, run_dir, console, job_type="experiment")


if __name__ == "__main__":
    sys.exit(run(main, "phase_costs", ExperimentConfig))
