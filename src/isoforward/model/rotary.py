"""Rotary positions (RoFormer, Su 2021, eq. 15) with the ways of reaching further than the model was pretrained for.

Features are paired as Llama's weights expect: i with i + D/2. Only frequencies are kept; cosines are computed for the
positions that are asked for, so that a context of a million positions costs nothing until it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from isoforward.base.config import ModelConfig


class Rotary(nn.Module):
    """Cosines and sines of positions."""

    frequencies: Tensor  # (D/2,), fp32

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", scaled_frequencies(config), persistent=False)
        self.scale = attention_scale(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Follows the model to its device, and no cast: frequencies of 16 bits turn far positions by a wrong angle.

        Computed anew on the CPU, so that a model built on the meta device gets numbers, the same on every device.
        """
        device = fn(self.frequencies).device
        with torch.device("cpu"):
            frequencies = scaled_frequencies(self.config)
        self.frequencies = frequencies.to(device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """positions (T,) to (2, T, D); (B, T) to (2, B, 1, T, D), one for all heads."""
        angles = positions[..., None] * self.frequencies  # (..., T, D/2)
        rotation = torch.stack((angles.cos(), angles.sin()))
        if self.scale != 1:
            rotation = rotation * self.scale
        rotation = torch.cat((rotation, rotation), dim=-1).to(dtype)
        return rotation.unsqueeze(2) if positions.dim() == 2 else rotation


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, H, T, D) by rotation (2, T, D) or (2, B, 1, T, D)."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    rotated: Tensor = x * cosine + torch.cat((-second, first), dim=-1) * sine
    return rotated


def scaled_frequencies(config: ModelConfig) -> Tensor:
    """(D/2,). `dynamic` changes nothing within the context, and beyond it nothing is computed."""
    D, scaling = config.head_width, config.rope_scaling
    frequencies: Tensor = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    if scaling is None:
        return frequencies
    kind = scaling.get("type", "llama3")
    if kind == "linear":  # Chen 2023, position interpolation
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return by_wavelength(frequencies, **{key: value for key, value in scaling.items() if key != "type"})
    return yarn(frequencies, config.rope_theta, scaling) if kind == "yarn" else frequencies


def by_wavelength(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: float
) -> Tensor:
    """Llama 3.1's: slow frequencies are divided by `factor`, fast ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequencies
    blend = ((original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies


def yarn(frequencies: Tensor, theta: float, scaling: Mapping[str, float]) -> Tensor:
    """Peng 2023, section 3.2: by how often a frequency turns within the original context. As Transformers has it."""
    D: int = 2 * len(frequencies)

    def feature(turns: float) -> float:
        return D * math.log(scaling["original_context"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(scaling.get("beta_fast") or 32), feature(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = (torch.arange(D // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    interpolated: Tensor = frequencies / scaling["factor"]
    return interpolated * (1 - kept) + frequencies * kept


def attention_scale(config: ModelConfig) -> float:
    """YaRN's temperature, on cosines and sines (Peng 2023, section 3.4); `mscale` is DeepSeek's. 1 for the others."""
    scaling = config.rope_scaling or {}
    if scaling.get("type") != "yarn":
        return 1.0
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return temperature(mscale) / temperature(mscale_all_dim) if mscale and mscale_all_dim else temperature(1)
