"""Int8 weights: a changed forward that reads a quarter of the bytes. For serving on a CPU.

Weights are rounded to int8 with a scale for each output, activations to 8 bits with one for all rows of a call, sums
are exact. What a row becomes therefore depends a little on the rows beside it. Embeddings, norms and attention stay
fp32. The kernels are those of torch's x86 engine (FBGEMM), which multiply int8 where the processor can (VNNI, AMX); on
older ones activations have 7 bits.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from isoforward.base.errors import BadInput
from isoforward.model.frozen_linear import scales_of
from isoforward.model.gpt import GPT, Linear


class Int8Linear(nn.Module):
    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = scales_of(weight).squeeze(1)
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings(action="ignore"):  # of the day when torch will have moved this elsewhere
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)
        self.narrow = not torch.cpu._is_vnni_supported()  # else sums of two products would overflow their 16 bits

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x.contiguous(), self.packed, self.narrow)  # type: ignore[no-any-return]


def refuse_unquantisable(device: torch.device) -> None:
    if device.type != "cpu":
        raise BadInput(f"precision=int8 is served on the CPU alone, not on {device.type}; write precision=bf16")
    if "x86" not in torch.backends.quantized.supported_engines:
        raise BadInput("precision=int8 needs the int8 kernels for x86, which this torch lacks; write precision=fp32")


def quantise(model: GPT) -> GPT:
    """In place: every matrix product of a frozen fp32 model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, Int8Linear(child))
    return model
