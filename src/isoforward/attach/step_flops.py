"""FLOPs of one training step of any module, by phase, counted as its operators are dispatched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from isoforward.measure.flops import FlopCounter, Overload, Scope


class StepFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`flops` by phase for as long as it is entered, in the hardware convention; `phase` gives that of the moment.

    Matrix products and CPU attention as measure/flops.py counts them, convolutions and other attention by PyTorch's own
    formulas. What runs is what would run without it.
    """

    def __init__(self, phase: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = phase
        self.products = FlopCounter(Scope({}), convention="hardware")
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        operator: Overload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = operator(*args, **(kwargs or {}))
        count = self.products.count(operator, args)
        if not count and operator._overloadpacket in flop_registry:
            count = flop_registry[operator._overloadpacket](*args, **(kwargs or {}), out_val=result)
        if count:
            self.flops[self.phase()] += count
        return result
