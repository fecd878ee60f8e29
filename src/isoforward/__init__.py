"""One forward, two lives: what training adds to the forward pass, and what serving costs.

The names below are the public interface; each is imported when it is first used, so that `import isoforward` is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoforward.errors import Refusal as Refusal
    from isoforward.inference import load as load
    from isoforward.measuring.estimates import Ratio as Ratio
    from isoforward.measuring.estimates import ratio as ratio
    from isoforward.measuring.phases import Phases as Phases
    from isoforward.measuring.phases import compare_phases as compare_phases
    from isoforward.results import Results as Results
    from isoforward.results import Row as Row
    from isoforward.results import read as read
    from isoforward.weights import export as export

__version__ = "0.1.0"

_HOMES = {
    "compare_phases": "measuring.phases",
    "Phases": "measuring.phases",
    "load": "inference",
    "export": "weights",
    "read": "results",
    "Results": "results",
    "Row": "results",
    "ratio": "measuring.estimates",
    "Ratio": "measuring.estimates",
    "Refusal": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'isoforward' has no attribute {name!r}")
    return getattr(import_module(f"isoforward.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
