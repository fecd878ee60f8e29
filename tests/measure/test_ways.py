"""Ways of serving: what each is given, and what one that is not to be had leaves."""

from functools import partial

import pytest

from isoforward.base.device import CpuDevice
from isoforward.formats.export import freeze
from isoforward.measure.case import Case
from isoforward.measure.mismatch import Likeliest, agreed, in_double, serve
from isoforward.measure.ways import Way, by_transformers, compiled_passes, in_transformers, unlike, usual_ways, way_rows
from isoforward.model.gpt import GPT
from tests.conftest import lively, tiny

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def master() -> GPT:
    return lively(GPT(tiny())).eval()


def test_prompts_of_every_length_from_1_on() -> None:
    assert [len(prompt) for prompt in unlike([[1, 2, 3]] * 5)] == [1, 2, 3, 1, 2]


def test_batches_are_whole_though_few_sequences_are_compared(master: GPT) -> None:
    case = Case(experiment="mismatch", model=master.config)
    prompts = [[n % 61] * 4 for n in range(64)]
    given = {(way.name, way.batch): len(way.prompts) for way in usual_ways(case, master, freeze(master), prompts, 2)}
    assert [given["cached decode", batch] for batch in (1, 4, 16, 64)] == [2, 4, 16, 64]
    assert given["left-padded batch", 64] == 64
    assert given["uncached", 1] == given["cached decode, compiled", 2] == 2


def test_without_a_compiler_the_compiled_way_is_a_row_that_says_so(
    master: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "missing_compiler", lambda self: "a C++ compiler, and there is none")
    case = Case(experiment="mismatch", model=master.config)
    compiled = partial(serve, compiled_passes, freeze(master), batch=3)
    way = Way(name="cached decode, compiled", batch=3, prompts=PROMPTS, serve=compiled)
    (row,) = way_rows(case, [way], 3, master, in_double(freeze(master)))
    assert (row.value, row.reason) == (None, "compiling needs a C++ compiler, and there is none")
    assert (row.conditions["way"], row.provenance) == ("cached decode, compiled", "unavailable")


@pytest.mark.slow
def test_compiled_decode_is_rounding_away_from_training(master: GPT) -> None:
    case = Case(experiment="mismatch", model=master.config)
    compiled = partial(serve, compiled_passes, freeze(master), batch=3)
    way = Way(name="cached decode, compiled", batch=3, prompts=PROMPTS, serve=compiled)
    rows = list(way_rows(case, [way], 3, master, in_double(freeze(master))))
    (largest,) = [r.number for r in rows if r.quantity == "difference" and r.conditions["statistic"] == "largest"]
    assert 0 < largest < 1e-4


def test_transformers_generate_gives_our_greedy_text(master: GPT) -> None:
    pytest.importorskip("transformers")
    told = by_transformers(in_transformers(master), PROMPTS, seed=1, new_tokens=10, temperature=0.0)
    assert [len(text) for text in told.texts] == [14] * 3
    assert agreed(told, Likeliest(master)) == 10
