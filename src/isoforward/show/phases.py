"""Times of both lives of one module, as Python gets them: rows, ratios, and a table when printed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from isoforward.base.results import Results, Row, only, write
from isoforward.base.statistics import Ratio
from isoforward.show.tables import show_rows


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The rows of one measurement, with the environment they hold in and the verdict on them. `print` shows them."""

    results: Results

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.results.rows

    @property
    def trusted(self) -> bool:
        """Whether the machine was quiet enough for the numbers to be believed; the verdict has the reasons."""
        return all(verdict.trusted for verdict in self.results.verdicts)

    def time(self, life: str, phase: str) -> Row:
        """Of `training`: forward, loss, backward, optimizer, step, residual; of `inference`: forward."""
        return only(self.results, life=life, phase=phase, quantity="time")

    def against_forward(self, phase: str) -> Ratio:
        """Time of a phase of training, or of its whole `step`, against the forward of inference, pair by pair."""
        return self.results.judge(self.time("training", phase), self.time("inference", "forward")).ratio

    def write(self, path: Path | str) -> None:
        """Appends to a results.jsonl, which `isoforward.read` and `isoforward report` open."""
        found = self.results
        write(path, [*found.environments.values(), *found.rows, *found.comparisons, *found.verdicts])

    def __str__(self) -> str:
        shown = io.StringIO()
        show_rows(Console(file=shown, width=80), self.results)
        return shown.getvalue()
