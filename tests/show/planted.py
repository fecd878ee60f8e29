"""Rows of two lives whose every figure is known by hand."""

from __future__ import annotations

from typing import Any

from isoforward.base.results import Environment, Results, Row, Verdict


def row(life: str, phase: str, value: float, *, quantity: str = "time", **changes: Any) -> Row:
    per = "step" if life == "training" else "token"
    samples = (value,) * 6 if quantity == "time" else ()
    fields: dict[str, Any] = {"unit": "s", "per": per, "conditions": {"tokens": 10}, "samples": samples} | changes
    return Row(experiment="planted", life=life, phase=phase, quantity=quantity, value=value, **fields)


ENVIRONMENT = Environment(id="here", command="python train.py", created="2026-01-02", identity={"cpu": "c"}, details={})
TRAINING_S = {"forward": 1.0, "loss": 0.5, "backward": 2.0, "optimizer": 0.5}
PLANTED = Results(
    rows=(
        row("inference", "forward", 0.0, quantity="identity", unit="differing logits", per="run"),
        *(row("training", phase, time_s) for phase, time_s in TRAINING_S.items()),
        *(
            row("training", phase, 100.0 * times, quantity="flops", unit="flop", convention="model")
            for phase, times in {"forward": 1, "backward": 2}.items()
        ),
        row("training", "step", 4.0),
        row("inference", "forward", 0.8, per="step"),
        row("inference", "prefill", 0.3, per="sequence", conditions={"tokens": 3}),
        row("inference", "decode", 0.2, conditions={"tokens": 1}),
        row("inference", "decode", 0.25, conditions={"tokens": 1, "context": 64, "cache": True}),
        row("inference", "decode", 0.75, conditions={"tokens": 1, "context": 64, "cache": False}),
        row("training", "backward", 900.0, quantity="memory", unit="byte"),
        row("inference", "forward", 300.0, quantity="memory", unit="byte"),
        row("training", "step", 640.0, quantity="memory", unit="byte", conditions={"category": "optimizer state"}),
    ),
    environments={"here": ENVIRONMENT},
    verdicts=(Verdict(experiment="planted", trusted=False, reasons=("planted",)),),
    warnings=(),
)
