"""From FLOPs and bytes to devices, time, whole lives and money: every such formula, once, with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping

from isoforward.base.checks import at_least, one_of
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.model.cost import backward_flops, forward_flops

# Many devices


def zero_bytes(state: Mapping[str, int], *, ways: int, stage: int) -> float:
    """What one of `ways` holds of a training_state: ZeRO-1 cuts the optimizer, 2 gradients too, 3 weights too
    (Rajbhandari 2020, section 5 and figure 1)."""
    one_of("stage", str(stage), ("0", "1", "2", "3"))
    at_least("ways", ways, 1)
    first_cut = {"optimizer": 1, "gradients": 2, "weights": 3}
    return sum(size / ways if stage >= first_cut[part] else size for part, size in state.items())


COLLECTIVES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}


def collective_bytes(name: str, size: int, *, ways: int) -> float:
    """Sent by each rank of a ring: (n-1)/n of the whole, twice for an all-reduce (Patarasuk & Yuan 2009, section 3)."""
    one_of("collective", name, tuple(COLLECTIVES))
    at_least("ways", ways, 1)
    return COLLECTIVES[name] * size * (ways - 1) / ways


def zero_traffic(state: Mapping[str, int], *, ways: int, stage: int) -> float:
    """Bytes each rank sends a step: as much as data parallelism up to ZeRO-2, half as much again for ZeRO-3, which
    gathers weights in forward and backward (Rajbhandari 2020, section 7)."""
    one_of("stage", str(stage), ("0", "1", "2", "3"))
    if stage == 0:
        return collective_bytes("all_reduce", state["gradients"], ways=ways)
    gathers = 2 if stage == 3 else 1
    reduced = collective_bytes("reduce_scatter", state["gradients"], ways=ways)
    return reduced + gathers * collective_bytes("all_gather", state["weights"], ways=ways)


# Time


def intensity(flops: float, moved_bytes: float) -> float:
    """FLOPs a byte (Williams 2009)."""
    return flops / moved_bytes


def roofline_time_s(
    flops: float, moved_bytes: float, *, flops_per_s: float | None, bytes_per_s: float | None
) -> float | None:
    """The longer of computing and moving, each at its peak (Williams 2009); None where a peak is unknown."""
    if flops_per_s is None or bytes_per_s is None:
        return None
    return max(flops / flops_per_s, moved_bytes / bytes_per_s)


def utilisation(work: float, *, time_s: float, peak_per_s: float | None) -> float | None:
    """MFU with convention=model FLOPs (PaLM, appendix B), HFU with hardware's (Korthikanti 2022, eqs. 7 and 8), MBU
    with inference_bytes and the bandwidth (gpt-fast); None where the peak is unknown, never a neighbour's."""
    return None if peak_per_s is None else work / time_s / peak_per_s


def mfu(
    config: ModelConfig, *, length: int, tokens_per_s: float, peak_flops_per_s: float | None, convention: str = "model"
) -> float | None:
    """Of training at `tokens_per_s`; divide the throughput by the devices, or multiply the peak."""
    forward = forward_flops(config, batch=1, length=length, convention=convention)
    step = forward + backward_flops(config, batch=1, length=length, convention=convention)
    return utilisation(step.total, time_s=length / tokens_per_s, peak_per_s=peak_flops_per_s)


# Whole lives, in FLOPs, days and money

TRAINED, TRAINED_RECOMPUTING, SERVED = 6, 8, 2
"""FLOPs a parameter and token (Kaplan 2020, section 2.1), and with every block recomputed (Narayanan 2021, eq. 4)."""


def lifetime_flops(*, per_parameter_token: int, parameter_count: float, tokens: float) -> float:
    """6ND to train, 8ND with recomputation, 2ND to serve; attention's square is left out."""
    at_least("parameters", parameter_count, 1)
    at_least("tokens", tokens, 0)
    return per_parameter_token * parameter_count * tokens


def days(flops: float, *, flops_per_s: float, devices: int = 1) -> float:
    """At `flops_per_s` achieved by each device, its peak times its MFU (Narayanan 2021, eq. 4)."""
    if not flops_per_s > 0:
        raise BadInput(f"flops_per_s={flops_per_s} must be positive")
    return flops / (flops_per_s * devices) / 86400


def money(time_s: float, *, price_per_hour: float, devices: int = 1) -> float:
    if not price_per_hour > 0:
        raise BadInput(f"price_per_hour={price_per_hour} must be positive: what one device costs an hour")
    return time_s / 3600 * devices * price_per_hour


def break_even_tokens(training_cost: float, cost_per_served_token: float) -> float:
    """Served tokens at which serving has cost as much as training, in any one unit. By 6ND and 2N it is 3D."""
    if not cost_per_served_token > 0:
        raise BadInput(f"a served token costs {cost_per_served_token}: serving never overtakes training")
    return training_cost / cost_per_served_token
