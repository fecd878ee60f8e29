"""What an engine that batches as requests come should take under a load, from what one prompt and one step take.

Little's law closes it: at `rate` requests a second, each staying W seconds, rate x W of them decode together; how long
a step takes depends on how many they are; and W on that. Prompts are read between steps, one by one, and delay them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MOST = 4096  # sequences decoded together
ROUNDS = 200


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of one request, on average; infinite where more comes than can be served."""

    ttft_s: float
    tpot_s: float
    whole_s: float
    together: float  # sequences decoded at once
    busy: float  # share of the time in which something is computed


UNSTABLE = Expected(ttft_s=math.inf, tpot_s=math.inf, whole_s=math.inf, together=math.inf, busy=1.0)


def expected(rate: float, *, prefill_s: float, decode_s: Callable[[float], float], new_tokens: int) -> Expected:
    """`decode_s(n)` is a step of n sequences.

    In a step's time S, rate x S prompts come and are read: S = decode_s(n) / (1 - rate x prefill_s). Of a prompt that
    comes while another is read, the wait is that of a queue with one server and fixed times (Pollaczek-Khinchine).
    """
    reading = rate * prefill_s
    if reading >= 1:
        return UNSTABLE
    together = 1.0
    for _ in range(ROUNDS):
        step_s = decode_s(max(1.0, together)) / (1 - reading)
        ttft_s = prefill_s + reading * prefill_s / (2 * (1 - reading)) + decode_s(max(1.0, together)) / 2
        whole_s = ttft_s + (new_tokens - 1) * step_s
        found = rate * (new_tokens - 1) * step_s
        if found > MOST:
            return UNSTABLE
        if abs(found - together) < 1e-6 * max(1.0, together):
            break
        together = (together + found) / 2
    idle = math.exp(-rate * whole_s)  # nobody is there: those that come are Poisson
    return Expected(ttft_s=ttft_s, tpot_s=step_s, whole_s=whole_s, together=together, busy=1 - idle)
