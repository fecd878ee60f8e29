"""Times of a plan on a machine that was calibrated: operator by operator, as far off as `predict` found them to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isoforward.base.config import MeasureConfig, ModelConfig, OptimConfig
from isoforward.base.datasheets import Hardware
from isoforward.measure.case import Case
from isoforward.model import cost
from isoforward.plan.forecast import HELD_OUT, PHASES, Calibrated, averaging_s
from isoforward.plan.planning import Figure
from isoforward.plan.subject import Known, Serving, Setup, Subject


@dataclass(frozen=True)
class CalibratedClock:
    hardware: Hardware
    by: Calibrated

    @property
    def basis(self) -> str:
        return f"calibration {self.by.conditions['calibration']} of {self.hardware.name}"

    def step(self, subject: Subject, setup: Setup) -> Figure:
        phases = self.times(model_of(subject), setup)
        parts = [phases[phase].scaled(1 if phase == "optimizer" else setup.accumulate) for phase in PHASES["training"]]
        if setup.devices > 1:
            parts.append(self.averaging(model_of(subject), setup))
        return Figure(
            value=sum(part.value for part in parts),
            low=sum(part.low for part in parts),
            high=sum(part.high for part in parts),
            doubt=next((part.doubt for part in parts if part.doubt), ""),
        )

    def averaging(self, model: ModelConfig, setup: Setup) -> Figure:
        """Of gradients between processes of this machine; they share its processors, which no calibration saw."""
        size = 4 * cost.parameters(model).total
        time_s = averaging_s(self.hardware.calibration, size, ways=setup.devices) or 0.0
        return Figure(value=time_s, low=time_s / 2, high=time_s * 2, doubt="processes share the processors")

    def prefill(self, subject: Subject, serving: Serving, devices: int) -> Figure:
        return self.served(subject, serving, sequences=1)["prefill"]

    def decode(self, subject: Subject, serving: Serving, devices: int) -> Figure:
        return self.served(subject, serving, sequences=serving.users)["decode"]

    def served(self, subject: Subject, serving: Serving, *, sequences: int) -> dict[str, Figure]:
        setup = Setup(batch=1, length=1, precision=serving.precision)
        return self.times(model_of(subject), setup, serving=serving, sequences=sequences)

    def times(
        self, model: ModelConfig, setup: Setup, *, serving: Serving | None = None, sequences: int = 1
    ) -> dict[str, Figure]:
        measure = MeasureConfig()
        if serving is not None:
            measure = MeasureConfig(prompt=serving.prompt, new_tokens=max(2, serving.new_tokens))
        optim = {"momentum": OptimConfig(name="sgd"), "sgd": OptimConfig(name="sgd", momentum=0.0)}
        case = Case(
            experiment="plan",
            model=model,
            batch=setup.micro_batch,
            length=setup.length,
            precision=setup.precision,
            checkpointing=setup.checkpointing,
            optim=optim.get(setup.optimizer) or OptimConfig(name=setup.optimizer),
            measure=measure,
        )
        found, warned = self.by.times(case, sequences=sequences)
        return {phase: figure(phase, time_s, warned.get(phase, ())) for phase, time_s in found.items()}


def figure(phase: str, time_s: float, warned: Sequence[str]) -> Figure:
    """An error is predicted over measured, less one."""
    least, most = HELD_OUT[phase]
    return Figure(value=time_s, low=time_s / (1 + most), high=time_s / (1 + least), doubt="; ".join(warned))


def model_of(subject: Subject) -> ModelConfig:
    assert isinstance(subject, Known)  # others are planned by the peaks that the calibration found
    return subject.model
