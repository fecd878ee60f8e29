"""What does this machine take for each operator of a GPT, and what is the most that it can do?

    python experiments/calibrate.py
    python experiments/calibrate.py threads=1 keep=false

Nothing else should run meanwhile: what was taken while something else ran is not kept. Writes a hardware file. Other
commands take it as hardware=runs/.../hardware.json, or as hardware=here if it is the newest of this machine.

:chapter: Planning
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import torch

from isoforward.app.command_line import run
from isoforward.app.question import Asking
from isoforward.app.run_directory import claim
from isoforward.app.telling import tell
from isoforward.base import units
from isoforward.base.checks import within
from isoforward.base.config import TrackingConfig
from isoforward.base.datasheets import Hardware, kept_here, save
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, Verdict, only, row_of, select
from isoforward.base.vocabulary import Condition
from isoforward.measure.trust import Findings, disturbed_by, over_all, shares
from isoforward.plan.calibration import calibrate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate:
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    threads: int = 0  # 0: as many as torch takes
    keep: bool = True  # for hardware=here to find
    run_dir: str = ""

    def __post_init__(self) -> None:
        within("threads", self.threads, 0, 4096)


def rows(hardware: Hardware) -> Iterator[Row]:
    made = hardware.calibration

    def told(phase: str, quantity: str, value: float, **conditions: Condition) -> Row:
        about: RowFields = {"life": "training", "per": "run"}
        at = {"calibration": made["id"], "hardware": hardware.name, **conditions}
        return row_of("calibrate", about, phase=phase, quantity=quantity, value=value, conditions=at)

    for dtype, peak in hardware.peak_flops_per_s.items():
        yield told("run", "peak_flops", peak, dtype=dtype)
    yield told("run", "peak_bandwidth", hardware.bandwidth_bytes_per_s)
    yield told("run", "bandwidth of copies", made["copying_bytes_per_s"])
    for size, rate in made["reading"]:
        yield told("run", "bandwidth of reads", rate, bytes_together=size)
    for phase, fit in made["beyond"].items():
        yield told(phase, "time beside each operator", fit["dispatch_s"])
        if phase == "optimizer":
            yield told(phase, "operators together", fit["scale"])
    if made["all_reduce"]:
        yield told("communication", "latency", made["all_reduce"]["latency_s"])
        yield told("communication", "bandwidth", made["all_reduce"]["bytes_per_s"])
    for kind, points in made["operators"].items():
        if kind.startswith(("product", "attention")):
            *size, unit_s = min(points, key=lambda point: point[-1])
            shape = " x ".join(str(n) for n in size)
            yield told("run", "best rate", 1 / unit_s, operator=kind, shape=shape, measured=len(points))


def answer(results: Results) -> str:
    peaks = {row.conditions["dtype"]: row.number for row in select(results, quantity="peak_flops")}
    read = only(results, quantity="peak_bandwidth")
    dispatch = only(results, quantity="time beside each operator", phase="decode").number
    ratio = peaks["bf16"] / peaks["fp32"]
    return (
        f"At best this machine multiplies {units.count(peaks['fp32'], 'FLOP/s')} in fp32 and "
        f"{units.count(peaks['bf16'], 'FLOP/s')} in bf16 ({units.times(ratio)}), and reads memory at "
        f"{units.count(read.number, 'B/s')}; in decoding an operator costs {units.seconds(dispatch)} beside its work. "
        f"Calibration {read.conditions['calibration']}."
    )


def main(config: Calibrate) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    with claim(config) as run_dir:
        run = Asking(run_dir)
        run.note()
        with run.console.status("calibrating") as status:
            hardware, found = calibrate(lambda what: status.update(f"calibrating: {what}"))
        judged = verdict_of(found)
        run.add(rows(hardware), judged)
        file = run_dir / "hardware.json"
        save(file, hardware)
        tell(config, run_dir, run.console, answer)
        if config.keep and not judged.trusted:
            raise BadInput(f"not kept for hardware=here: {judged.reasons[0]}; hardware={file} takes it all the same")
        if config.keep:
            save(kept_here() / f"{hardware.calibration['id']}.json", hardware)
        run.say(f"hardware={file}" + (", found by hardware=here" if config.keep else ""))


def verdict_of(found: Sequence[Findings]) -> Verdict:
    """By cause alone: that single operators spread is what the forecast averages over."""
    disturbance = disturbed_by(found)
    reasons = () if disturbance is None else (disturbance,)
    return Verdict(experiment="calibrate", trusted=not reasons, reasons=reasons, figures=shares(over_all(found)))


if __name__ == "__main__":
    sys.exit(run(main, Calibrate))
