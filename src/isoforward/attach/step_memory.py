"""Bytes of the tensors that are alive in one training step of any module, at the peak of each phase."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoforward.measure.flops import Overload


class StepMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`peaks` by phase for as long as it is entered; `phase` gives that of the moment.

    Counted are the `held` tensors, and all that operators then read or make on `device`; each storage once, until it is
    freed. What kernels and libraries take for themselves is not seen.
    """

    def __init__(self, phase: Callable[[], str], device: torch.device, held: Iterable[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase, self.device = phase, device
        self.alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self.total = 0
        self.peaks: dict[str, int] = {}
        for one in held:
            self._hold(one)

    def __torch_dispatch__(
        self,
        operator: Overload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            self._hold(leaf)
        phase = self.phase()
        self.peaks[phase] = max(self.total, self.peaks.get(phase, 0))
        return result

    def _hold(self, tensor: object) -> None:
        if not isinstance(tensor, Tensor) or tensor.device != self.device or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._release(key))
            self.total += storage.nbytes()

    def _release(self, key: int) -> None:
        self.total -= self.alive.pop(key)[0]
