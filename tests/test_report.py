"""The report: one file that says what the rows say, shows no number without its origin, and lets nothing in or out."""

from __future__ import annotations

import random

from isoforward import estimates
from isoforward.results import Condition, Environment, Record, Row, Verdict

LAYERS, WIDTH, PARAMETERS = 4, 128, 921_600
BATCH, LENGTH, PROMPT = 16, 256, 128
TRAINING_S = {"forward": 0.0331, "loss": 0.0042, "backward": 0.0718, "optimizer": 0.0063}
ENVIRONMENT = Environment(
    id="e1",
    command="python train.py model=tiny",
    created="2026-01-02T03:04:05+00:00",
    identity={"device": "cpu", "cpu": "Xeon", "threads": 2, "gpu": None, "torch": "2.13.0"},
    details={"commit": "abc1234", "load": 0.2, "governor": None},
)


def two_lives(*, slower: float = 1.0, seed: int = 1, **labels: Condition) -> list[Record]:
    """The rows of one run in which both lives were measured, as `measure` writes them."""
    draw = random.Random(seed)
    shape = {"family": "gpt2", "layers": LAYERS, "width": WIDTH, "heads": 4, "vocab": 1024, "parameters": PARAMETERS}
    conditions = {**shape, "dtype": "bf16", **labels}
    training = {**conditions, "batch": BATCH, "length": LENGTH, "tokens": BATCH * LENGTH, "optimizer": "adamw"}
    rows: list[Row] = []

    def add(life: str, phase: str, quantity: str, unit: str, per: str, value: float | None, **more: object) -> None:
        rows.append(
            Row(
                experiment="phase_costs",
                life=life,
                phase=phase,
                quantity=quantity,
                unit=unit,
                per=per,
                value=value,
                **{"conditions": conditions, "environment": "e1", **more},
            )
        )

    def time(life: str, phase: str, per: str, value: float, **at: Condition) -> None:
        samples = [slower * value * draw.lognormvariate(0, 0.02) for _ in range(15)]
        told = estimates.summarise(samples)
        more = {"low": told.low, "high": told.high, "samples": told.samples}
        add(life, phase, "time", "s", per, told.median, **more, conditions={**conditions, **at})

    add("inference", "forward", "identity", "differing logits", "run", 0.0, conditions={**conditions, "logits": 262144})
    for phase, value in TRAINING_S.items():
        time("training", phase, "step", value, **training)
    time("training", "step", "step", sum(TRAINING_S.values()) * 1.004, **training)
    time("training", "residual", "step", 0.0005, **training)
    add("training", "step", "time", "s", "step", 0.31, conditions={**training, "cold": True})
    time("inference", "forward", "step", 0.0272, batch=BATCH, length=LENGTH, tokens=BATCH * LENGTH)
    serving: dict[str, Condition] = {"batch": 1, "prompt": PROMPT}
    decoding = {**serving, "tokens": 1, "new_tokens": 64, "cache": True}
    time("inference", "prefill", "sequence", 0.00195, **serving, tokens=PROMPT)
    time("inference", "decode", "token", 0.00081, **decoding)
    for context in (16, 32, 64, 128, 256):
        time("inference", "decode", "token", 0.0008 + context * 1e-7, batch=1, tokens=1, context=context, cache=True)
        time("inference", "decode", "token", 0.0007 + context * 1.4e-5, batch=1, tokens=1, context=context, cache=False)
    counted = {"provenance": "counted", "convention": "model"}
    forward_flops = 8.6e9
    for phase, flops in {
        "forward": forward_flops,
        "loss": 0.0,
        "backward": 2 * forward_flops,
        "optimizer": 1e7,
    }.items():
        add("training", phase, "flops", "flop", "step", flops, **counted, conditions=training)
    at = {"batch": BATCH, "length": LENGTH, "tokens": BATCH * LENGTH}
    add("inference", "forward", "flops", "flop", "step", forward_flops, **counted, conditions={**conditions, **at})
    at = {**conditions, **serving, "tokens": PROMPT}
    add("inference", "prefill", "flops", "flop", "sequence", 2.6e8, **counted, conditions=at)
    add("inference", "decode", "flops", "flop", "token", 2.05e6, **counted, conditions={**conditions, **decoding})
    predicted = {"provenance": "predicted"}
    add("inference", "prefill", "bytes", "byte", "sequence", 2.2e6, **predicted, conditions=at)
    add("inference", "decode", "bytes", "byte", "token", 2.1e6, **predicted, conditions={**conditions, **decoding})
    for life, phase in (("training", "step"), ("inference", "run")):
        why = {"provenance": "unavailable", "reason": "no energy meter on this machine"}
        add(life, phase, "energy", "joule", "step" if life == "training" else "sequence", None, **why)
    counted = {"provenance": "counted"}
    for phase, peak in {"forward": 9.1e7, "loss": 1.3e8, "backward": 1.42e8, "optimizer": 2.1e7}.items():
        add("training", phase, "memory", "byte", "step", peak, **counted, conditions=training)
    for phase, peak in {"forward": 2.6e7, "prefill": 3.4e6, "decode": 2.6e6}.items():
        add("inference", phase, "memory", "byte", "token", peak, **counted)
    ledgers = {
        "training": {
            "parameters": 3.7e6,
            "gradients": 3.7e6,
            "optimizer state": 7.4e6,
            "activations.attention": 2.9e7,
            "activations.mlp": 3.8e7,
            "activations.norm": 9.0e6,
            "logits and loss": 3.4e7,
            "temporaries": 1.7e7,
        },
        "inference": {"weights": 1.85e6, "KV cache": 5.2e5, "transients": 3.0e5},
    }
    for life, ledger in ledgers.items():
        whole = {"life": life, "phase": "step" if life == "training" else "run", "per": "step"}
        beside = {"measured peak": sum(ledger.values()) * 1.03, "unexplained": sum(ledger.values()) * 0.03}
        for category, size in (ledger | beside).items():
            kind = {"provenance": "measured" if category in beside else "counted"}
            at = {**(training if life == "training" else conditions), "category": category}
            add(**whole, quantity="memory", unit="byte", value=size, **kind, conditions=at)
    return [ENVIRONMENT, *rows, Verdict(experiment="phase_costs", trusted=True, environment="e1")]


def peaks() -> list[Record]:
    whole = {"experiment": "phase_costs", "life": "training", "phase": "run", "per": "run", "environment": "e1"}
    return [
        Row(**whole, quantity="peak_flops", unit="flop/s", value=1.9e12, low=1.85e12, high=1.93e12),
        Row(**whole, quantity="peak_bandwidth", unit="byte/s", value=2.4e10, low=2.3e10, high=2.5e10),
    ]
