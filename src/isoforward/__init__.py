"""One forward, two lives: what training adds to the forward pass, and what serving costs.

The names below are the public interface; each is imported when it is first used, so that `import isoforward` is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isoforward.app.any_module import compare_phases as compare_phases
    from isoforward.attach.lightning_callback import PhaseCosts as PhaseCosts
    from isoforward.attach.plain_loop import phase_costs as phase_costs
    from isoforward.attach.transformers_callback import PhaseCostsCallback as PhaseCostsCallback
    from isoforward.base.errors import Refusal as Refusal
    from isoforward.base.results import Results as Results
    from isoforward.base.results import Row as Row
    from isoforward.base.results import read as read
    from isoforward.base.statistics import Ratio as Ratio
    from isoforward.base.statistics import ratio as ratio
    from isoforward.formats.export import export as export
    from isoforward.serve.inference import load as load
    from isoforward.show.phases import Phases as Phases

__version__ = "0.1.0"

_HOMES = {
    "compare_phases": "app.any_module",
    "Phases": "show.phases",
    "phase_costs": "attach.plain_loop",
    "PhaseCosts": "attach.lightning_callback",
    "PhaseCostsCallback": "attach.transformers_callback",
    "load": "serve.inference",
    "export": "formats.export",
    "read": "base.results",
    "Results": "base.results",
    "Row": "base.results",
    "ratio": "base.statistics",
    "Ratio": "base.statistics",
    "Refusal": "base.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'isoforward' has no attribute {name!r}")
    return getattr(import_module(f"isoforward.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
