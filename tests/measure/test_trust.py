"""The verdict: the precision that was asked for, and nobody in between."""

from __future__ import annotations

import dataclasses

from isoforward.base.config import MeasureConfig
from isoforward.base.disturbance import Disturbance
from isoforward.measure.benchmark import Part, Work, measure
from isoforward.measure.trust import Findings, Imprecise, alone, findings, verdict

PLAN = MeasureConfig(precision=0.03)
QUIET = Findings(
    times=6,
    imprecise=(),
    samples=200,
    retaken=3,
    disturbed=0,
    disturbance=Disturbance(elapsed_s=40.0, run_delay_s=0.1, others_s=0.5),
    busiest=("", 0.0),
    drift=None,
    stopped=False,
)


def reasons(plan: MeasureConfig = PLAN, **changes: object) -> tuple[str, ...]:
    return verdict("e", [dataclasses.replace(QUIET, **changes)], plan).reasons  # type: ignore[arg-type]


def test_precise_and_undisturbed_is_trusted_whatever_single_samples_did() -> None:
    assert verdict("e", [QUIET], PLAN).trusted


def test_another_process_is_named_with_what_it_used() -> None:
    over = Disturbance(elapsed_s=40.0, run_delay_s=20.0, others_s=36.0)
    (reason,) = reasons(disturbance=over, disturbed=150, busiest=("yes", 35.0))
    assert reason.startswith("other processes (mostly yes) used 0.9 of")
    assert "measure.budget" in reason


def test_the_hypervisor_is_told_from_other_processes() -> None:
    over = Disturbance(elapsed_s=40.0, run_delay_s=0.1, stolen_s=8.0)
    (reason,) = reasons(disturbance=over, disturbed=150)
    assert reason.startswith("the hypervisor took 20.2% of the time")


def test_little_stolen_time_does_not_hide_who_used_the_machine() -> None:
    over = Disturbance(elapsed_s=40.0, run_delay_s=0.01, stolen_s=0.02, others_s=36.0)
    (reason,) = reasons(disturbance=over, disturbed=0)
    assert reason.startswith("other processes used 0.9 of")


def test_a_little_waiting_is_told_by_its_share_of_the_time() -> None:
    over = Disturbance(elapsed_s=40.0, run_delay_s=1.8, others_s=0.4)
    (reason,) = reasons(disturbance=over, disturbed=30)
    assert reason.startswith("other processes took 4.5% of the time")


def test_a_quota_that_ran_out_is_named() -> None:
    over = Disturbance(elapsed_s=40.0, throttled=17)
    (reason,) = reasons(disturbance=over, disturbed=150)
    assert "quota" in reason and "17 periods" in reason


def test_missed_precision_says_which_time_and_what_budget_would_do() -> None:
    missed = (Imprecise(name="training loss", half_width=0.06),)
    (reason,) = reasons(imprecise=missed)
    assert reason.startswith("1 of 6 times are known less precisely than 3%, training loss to 6.0%")
    assert "measure.budget=200" in reason  # four times as long: half-widths shrink with the root
    (reason,) = reasons(MeasureConfig(precision=0.03, repeats=20), imprecise=missed)
    assert "measure.repeats=80" in reason


def test_at_most_two_reasons_are_given_and_stopping_comes_first() -> None:
    over = Disturbance(elapsed_s=40.0, run_delay_s=20.0, others_s=36.0)
    missed = (Imprecise(name="training loss", half_width=0.06),)
    told = reasons(stopped=True, disturbance=over, disturbed=150, imprecise=missed, drift=0.5)
    assert len(told) == 2
    assert told[0].startswith("stopped early by Ctrl-C")


def test_a_training_that_ran_once_is_judged_by_what_else_ran() -> None:
    assert alone("speedrun", Disturbance(elapsed_s=100.0, others_s=1.0)).trusted
    assert not alone("speedrun", Disturbance(elapsed_s=100.0, others_s=60.0)).trusted


def test_a_server_that_is_measured_disturbs_nothing() -> None:
    busy = Disturbance(elapsed_s=100.0, others_s=90.0)
    assert alone("serving", busy, others_are_measured=True).trusted
    (reason,) = alone("serving", dataclasses.replace(busy, stolen_s=30.0), others_are_measured=True).reasons
    assert reason.startswith("the hypervisor took 30.0% of the time")


def test_what_several_processes_leave_open_takes_more_of_them() -> None:
    missed = (Imprecise(name="training loss", half_width=0.06),)
    (reason,) = reasons(dataclasses.replace(PLAN, processes=3), imprecise=missed)
    assert reason.startswith("1 of 6 times are known less precisely than 3%, training loss to 6.0%")
    assert "write measure.processes=12" in reason


def test_a_work_that_is_in_two_comparisons_is_counted_once() -> None:
    works = [
        Work(parts=(Part(life="training", phase=phase, per="step", conditions={}),), run=lambda n: (1.0,))
        for phase in ("forward", "backward", "step")
    ]
    base, *others = (work.part for work in works)
    plan = MeasureConfig(repeats=10, warmup=1)
    assert findings(measure(works, [(other, base) for other in others], plan, seed=0)).times == 3
