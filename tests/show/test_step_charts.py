import json
from dataclasses import replace
from typing import Any

from isoforward.base.results import Results, Row
from isoforward.show.step_charts import steps
from tests.planted import noisy, results_of, timed


def rows_of(times: dict[str, dict[str, float]]) -> list[Row]:
    return [
        timed("training", phase, "step", noisy(time_s), adapter=setting)
        for setting, phases in times.items()
        for phase, time_s in phases.items()
    ]


FULL = {"forward": 1.0, "backward": 2.0, "optimizer": 0.5, "step": 3.6, "residual": 0.1}
LORA = {"forward": 1.1, "backward": 1.2, "optimizer": 0.1, "step": 2.4, "residual": 0.1}


def drawn(results: Results) -> Any:
    chart = steps("planted", results)
    assert chart is not None
    return chart


def test_each_setting_is_a_bar_of_its_phases_and_nothing_else() -> None:
    chart = drawn(results_of(rows_of({"full": FULL, "LoRA": LORA})))
    assert [(each["what"], each["phase"]) for each in chart.table] == [
        (setting, phase) for setting in ("full", "LoRA") for phase in ("forward", "backward", "optimizer")
    ]
    text = json.dumps(chart.spec)
    assert all(f'"{share}"' in text for share in ("29%", "57%", "14%"))  # 1, 2 and 0.5 of 3.5


def test_one_setting_alone_or_settings_that_are_numbers_are_no_such_picture() -> None:
    assert steps("planted", results_of(rows_of({"full": FULL}))) is None
    numbered = [replace(row, conditions={"batch": n}) for n in (1, 2) for row in rows_of({"x": FULL})]
    assert steps("planted", results_of(numbered)) is None


def test_steps_that_hold_both_lives_are_drawn_whatever_tells_them_apart() -> None:
    rolled = timed("inference", "decode", "step", noisy(2.0), adapter="x")
    numbered = [replace(row, conditions={"group": n}) for n in (4, 8) for row in [rolled, *rows_of({"x": FULL})]]
    chart = drawn(results_of(numbered))
    assert list(dict.fromkeys(each["what"] for each in chart.table)) == ["group=4", "group=8"]
    assert [each["phase"] for each in chart.table][:4] == ["decode", "forward", "backward", "optimizer"]
