"""A model of many layers from two of few: layers of a kind cost the same, and they come in periods.

Two shorter models differ by one period. What is alive at a moment of both changes by as much with every further one,
and so do FLOPs. A peak is the largest of many moments, and another of them at another depth: so each moment is
extended, and not the peak. Moments of the first periods stand at the same place from the start of a phase, those of the
last ones from its end; in between, bytes rise or fall evenly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from isoforward.measure.timeline import Moment
from isoforward.model.cost import Parts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")  # a layer's own number is not its kind
EDGES = 2  # periods that a shorter model keeps, at least: the first and the last


class Count(NamedTuple):
    moments: dict[str, list[Moment]]  # by phase
    flops: dict[str, int]  # by phase
    kept_bytes: int = 0  # in a cache

    def peaks(self) -> dict[str, Parts]:
        return {phase: highest(moments).held for phase, moments in self.moments.items()}


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """From layer `start`, `times` equal periods of `period` layers."""

    start: int
    period: int
    times: int

    def without(self, dropped: int, layers: int) -> list[int]:
        """Numbers of the layers that stay."""
        end = self.start + self.period * self.times
        return [n for n in range(layers) if not end - dropped * self.period <= n < end]


def repeats(kinds: Sequence[object]) -> Repeats | None:
    """Where leaving out all periods but a few takes the most layers away; None where twice what is left is no less."""
    best, least = None, len(kinds)
    for period in range(1, len(kinds) // 2 + 1):
        start = 0
        for n in range(len(kinds) - period + 1):
            if n + period < len(kinds) and kinds[n] == kinds[n + period]:
                continue
            times = (n - start) // period + 1
            cost = 2 * (len(kinds) - (times - edges(period)) * period) + period
            if times > edges(period) + 1 and cost < least:
                best, least = Repeats(start=start, period=period, times=times), cost
            start = n + 1
    return best


def edges(period: int) -> int:
    return EDGES + (period == 1)


def kinds_of(model: nn.Module, layers: int) -> list[object]:
    """What each layer is, by modules, shapes and settings; empty where the model has no list of as many."""
    blocks = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
    return [kind_of(block) for block in blocks or ()]


def kind_of(block: nn.Module) -> object:
    settings = [
        (name, value)
        for module in block.modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | str) and name not in PLACES
    ]
    return repr(block), [parameter.shape for parameter in block.parameters()], settings


def listed_kinds(config: PretrainedConfig, layers: int) -> list[object]:
    """By what the config lists for each layer."""
    return list(zip(*(value for _, value in lists(config, layers)), strict=True)) or [()] * layers


def lists(config: PretrainedConfig, layers: int) -> list[tuple[str, list[object]]]:
    return [(key, value) for key, value in vars(config).items() if isinstance(value, list) and len(value) == layers]


def shortened(config: PretrainedConfig, stay: Sequence[int]) -> PretrainedConfig:
    """The config of a model of these layers alone."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    for key, value in lists(text, text.num_hidden_layers):
        setattr(text, key, [value[n] for n in stay])
    text.num_hidden_layers = len(stay)
    return short


def extended(less: Count, more: Count, periods: int) -> Count:
    """`periods` beyond those of `more`."""
    return Count(
        moments={phase: moments(less.moments[phase], more.moments[phase], periods) for phase in more.moments},
        flops={phase: on(less.flops[phase], more.flops[phase], periods) for phase in more.flops},
        kept_bytes=on(less.kept_bytes, more.kept_bytes, periods),
    )


def on(less: int, more: int, periods: int) -> int:
    return more + periods * (more - less)


def moments(less: Sequence[Moment], more: Sequence[Moment], periods: int) -> list[Moment]:
    """A phase that runs through the layers more than once, as an optimizer's does, has moments between its runs that
    stand at no same place: of those, the highest is extended.
    """
    first, last = alike(less, more), alike(less[::-1], more[::-1])
    if first + last >= len(less):
        first = (first + len(less) - last) // 2
        last = len(less) - first
    pairs = [*zip(less[:first], more[:first], strict=True)]
    pairs += zip(less[len(less) - last :], more[len(more) - last :], strict=True)
    if between := less[first : len(less) - last]:
        pairs.append((highest(between), highest(more[first : len(more) - last])))
    return [
        Moment(one.operator, Parts({part: on(size, other.held[part], periods) for part, size in one.held.items()}))
        for one, other in pairs
    ]


def alike(some: Iterable[Moment], others: Iterable[Moment]) -> int:
    """Moments from the start that the same operators end."""
    same = takewhile(lambda pair: pair[0].operator == pair[1].operator, zip(some, others, strict=False))
    return sum(1 for _ in same)


def highest(of: Iterable[Moment]) -> Moment:
    return max(of, key=lambda moment: moment.held.total)
