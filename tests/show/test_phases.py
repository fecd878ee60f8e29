"""What Python gets of a measurement is what its rows say."""

from isoforward.show.phases import Phases
from tests.planted import compared, noisy, results_of, timed


def test_times_and_ratios_are_those_of_the_rows() -> None:
    step, forward = (
        timed(life, phase, "step", noisy(seconds))
        for life, phase, seconds in (("training", "step", 3.0), ("inference", "forward", 1.0))
    )
    phases = Phases(results=results_of([step, forward], [compared(step, forward)]))
    assert phases.time("training", "step") == step
    assert 2.9 < phases.against_forward("step").value < 3.1
    assert "forward" in str(phases) and phases.trusted
