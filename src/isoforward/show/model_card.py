"""Sections of an export's README.md: how the weights were trained, what the run measured, a sample."""

from __future__ import annotations

from collections.abc import Mapping

from isoforward.show.compare import BothLives


def about_training(facts: Mapping[str, object]) -> str:
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    return "\n".join(["## How it was trained", "", *lines, ""])


def about_costs(comparison: BothLives, where: Mapping[str, object]) -> str:
    """Numbers of the run that wrote the export, with what they hold for and whether they can be believed."""
    lines = [*comparison.training, comparison.step, *comparison.inference]
    of, doubts = comparison.conditions, "; ".join(comparison.warnings)
    return "\n".join(
        [
            "## What both its lives cost",
            "",
            comparison.headline,
            "",
            "| life | phase | time | a token | FLOP | peak memory |",
            "|---|---|---:|---:|---:|---:|",
            *(f"| {' | '.join([line.life, line.label, *line.costs])} |" for line in lines),
            "",
            f"Measured on {where.get('gpu') or where.get('cpu')}, {where.get('threads')} threads, "
            f"torch {where.get('torch')}, in {of['dtype']}: training on {of['batch']} x {of['length']} tokens, "
            "serving one sequence. "
            + (f"Take these numbers with care: {doubts}." if doubts else "The run found no reason to doubt them."),
            "",
        ]
    )


def about_text(prompt: str, sample: str) -> str:
    quoted = sample.replace("```", "~~~")
    return f"## What it says\n\n```text\n{quoted}\n```\n\nFrom the prompt `{prompt}`, sampled once.\n"
