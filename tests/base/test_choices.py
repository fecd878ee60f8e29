"""What is measured is kept where nothing disturbed it, and believed where it is of this machine; times are planted."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from isoforward.base import choices
from isoforward.base.choices import BUDGET_S, ROUNDS, Measuring, Way, fastest
from isoforward.base.disturbance import Disturbance
from isoforward.base.errors import BadInput

OF = {"shape": [3, 4]}


def planted(**times_s: float) -> Callable[[], Mapping[str, Way]]:
    return lambda: {name: lambda took_s=took_s: took_s for name, took_s in times_s.items()}


def never() -> Mapping[str, Way]:
    pytest.fail("measured again")


@pytest.fixture
def started(quiet: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Goes on as another process on the same machine would."""
    return lambda: monkeypatch.setattr(choices, "_measuring", Measuring())


@pytest.mark.parametrize(
    ("times_s", "chosen"),
    [
        ({"linear": 1.0, "mv": 0.5, "onednn": 0.7}, "mv"),
        ({"linear": 1.0, "mv": 2.0, "onednn": 0.7}, "onednn"),
        ({"linear": 1.0, "mv": 0.92, "onednn": 1.0}, "linear"),  # a close call is the plain one's
        ({"linear": 1.0}, "linear"),
    ],
)
def test_the_fastest_is_chosen_and_kept(started: Callable[[], None], times_s: dict[str, float], chosen: str) -> None:
    found = fastest("product", OF, "linear", planted(**times_s))
    assert found.chosen == chosen
    assert found.ratios == pytest.approx({name: took_s for name, took_s in times_s.items() if name != "linear"})
    assert fastest("product", OF, "linear", never).chosen == chosen
    if found.ratios:
        started()
        assert fastest("product", OF, "linear", never) == found


def test_the_median_of_pairs_withstands_one_slow_round(quiet: None) -> None:
    slow = iter([1.0, 9.0])
    ways = {"linear": lambda: 1.0, "mv": lambda: next(slow, 0.5)}
    assert fastest("product", OF, "linear", lambda: ways).ratios == {"mv": 0.5}


@pytest.mark.parametrize("change", ["threads", "torch", "cpu"])
def test_what_another_machine_or_build_found_is_not_believed(
    started: Callable[[], None], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    fastest("product", OF, "linear", planted(linear=1.0, mv=0.5))
    started()
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setattr(choices, "cpu_model", lambda: "another")
    assert fastest("product", OF, "linear", planted(linear=1.0, mv=2.0)).chosen == "linear"


def test_what_was_disturbed_is_neither_used_nor_kept(
    started: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(choices, "between", lambda before, after: Disturbance(elapsed_s=1.0, run_delay_s=0.5))
        found = fastest("product", OF, "linear", planted(linear=1.0, mv=0.1))
        assert (found.chosen, found.ratios) == ("linear", {})
        assert found.why == "other programs kept the processors busy"
        assert fastest("product", {"shape": [5]}, "linear", never).chosen == "linear"  # nor is anything tried after it
    assert not list(tmp_path.rglob("*.json"))
    started()
    assert fastest("product", OF, "linear", planted(linear=1.0, mv=0.1)).chosen == "mv"


def test_on_a_busy_machine_nothing_is_even_built(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "is_busy", lambda: True)
    assert fastest("product", OF, "linear", never).why == "other programs kept the processors busy"


def test_a_disturbed_round_is_left_out(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "is_busy", lambda: False)
    asked = iter(range(100))
    monkeypatch.setattr(
        choices, "between", lambda *_: Disturbance(elapsed_s=1.0, throttled=0 if next(asked) % 3 else 1)
    )
    times = iter([1.0] + [9.0 if n % 3 == 0 else 0.5 for n in range(2 * ROUNDS)])  # the set-up's, then each round's
    found = fastest("product", OF, "linear", lambda: {"linear": lambda: 1.0, "mv": lambda: next(times)})
    assert found.ratios == {"mv": 0.5}


def test_a_process_measures_no_longer_than_its_budget(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]

    def slow() -> float:
        now_s[0] += BUDGET_S / 3
        return 1.0

    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    found = fastest("product", OF, "linear", lambda: {"linear": slow, "mv": slow})
    assert (found.chosen, found.why) == ("linear", "no time was left to measure")
    assert now_s[0] < 2 * BUDGET_S
    assert fastest("product", {"shape": [5]}, "linear", never).chosen == "linear"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"chosen": "mv"}', '{"chosen": "mv", "ratios": {"mv": "much"}}'])
def test_a_damaged_file_is_measured_again(started: Callable[[], None], tmp_path: Path, content: str) -> None:
    fastest("product", OF, "linear", planted(linear=1.0, mv=0.5))
    (kept,) = tmp_path.rglob("product-*.json")
    assert json.loads(kept.read_text())["of"]["shape"] == [3, 4]
    kept.write_text(content)
    started()
    assert fastest("product", OF, "linear", planted(linear=1.0, mv=2.0)).chosen == "linear"


def test_reference_measures_nothing(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFORWARD_KERNELS", "reference")
    found = fastest("product", OF, "linear", never)
    assert (found.chosen, found.why) == ("linear", "kernels=reference")


def test_a_variable_that_says_anything_else_is_refused_by_name(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFORWARD_KERNELS", "refrence")
    with pytest.raises(BadInput, match="ISOFORWARD_KERNELS=refrence is not known: did you mean reference"):
        fastest("product", OF, "linear", never)
