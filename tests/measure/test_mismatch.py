"""Distances of log-probabilities, by hand; training against itself is 0; fp64 against fp64 is rounding."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from isoforward.base.results import Row
from isoforward.formats.export import freeze
from isoforward.measure.case import Case
from isoforward.measure.mismatch import (
    Likeliest,
    Served,
    agreed,
    distances,
    distances_of_logits,
    forward_logits,
    in_double,
    logprobs_of,
    rows_of,
    serve,
)
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import forward_passes
from isoforward.serve.exact import use_exact
from tests.conftest import lively, tiny

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [1, 2, 3, 4]]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def found(served: Tensor, trained: Tensor) -> dict[tuple[str, str | None], float]:
    return {(quantity, statistic): value for quantity, statistic, value in distances(served, trained)}


def test_distances_of_three_tokens_by_hand() -> None:
    """Probabilities 0.5, 0.2, 0.1 under the sampler and 0.5, 0.3, 0.09 under training."""
    of = found(double(0.5, 0.2, 0.1).log(), double(0.5, 0.3, 0.09).log())
    assert of["difference", "largest"] == pytest.approx(math.log(1.5))
    assert of["difference", "mean"] == pytest.approx((math.log(1.5) - math.log(0.9)) / 3)
    assert of["equal", None] == pytest.approx(1 / 3)
    assert of["importance ratio", "smallest"] == pytest.approx(0.9)
    assert of["importance ratio", "largest"] == pytest.approx(1.5)
    assert of["clipped", None] == pytest.approx(1 / 3)
    assert of["divergence", "k1"] == pytest.approx(-(math.log(1.5) + math.log(0.9)) / 3)
    assert of["divergence", "k3"] == pytest.approx((0.5 - math.log(1.5) + (-0.1) - math.log(0.9)) / 3)


def test_both_estimates_meet_the_divergence_over_the_vocabulary() -> None:
    """Of 200 000 samples of one distribution; k3 has the smaller variance (Schulman 2020)."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(8, generator=generator).double().log_softmax(-1)
    q = (p + 0.1 * torch.randn(8, generator=generator)).log_softmax(-1)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    of = found(p[tokens], q[tokens])
    whole = {statistic: value for _, statistic, value in distances_of_logits(p[None], q[None])}["whole vocabulary"]
    assert of["divergence", "k3"] == pytest.approx(whole, rel=0.03)
    assert of["divergence", "k1"] == pytest.approx(whole, rel=0.3)


def test_a_flip_of_the_likeliest_token_is_counted_in_a_thousand() -> None:
    one = torch.eye(4)
    other = one[[0, 1, 2, 0]]
    assert [value for name, _, value in distances_of_logits(one, other) if name == "flips"] == [250]


@pytest.fixture(scope="module")
def pair() -> tuple[GPT, GPT]:
    master = lively(GPT(tiny()))
    return master, freeze(master)


def test_training_against_itself_is_exactly_0(pair: tuple[GPT, GPT]) -> None:
    master, frozen = pair
    texts = serve(forward_passes, frozen, PROMPTS, batch=3, seed=1, new_tokens=20).texts
    starts = [4] * 3
    one, other = (logprobs_of([t[3:-1] for t in forward_logits(master, texts)], texts, starts) for _ in range(2))
    assert torch.equal(one, other)


def test_fp64_against_fp64_is_rounding(pair: tuple[GPT, GPT]) -> None:
    """A hundred or so sums of numbers of size 1: within 1e-12, and not the same bits."""
    exact = in_double(pair[1])
    served = serve(forward_passes, exact, PROMPTS, batch=1, seed=1, new_tokens=28)
    trained = logprobs_of(served.own(forward_logits(exact, served.texts)), served.texts, served.prompts)
    apart = (double(*[one for each in served.logprobs for one in each]) - trained).abs()
    assert 0 < float(apart.max()) < 1e-12


def test_rows_say_which_side_is_nearer_to_fp64_and_exact_serving_is_0(pair: tuple[GPT, GPT]) -> None:
    master, frozen = pair
    case = Case(experiment="mismatch", model=master.config)
    passes = partial(forward_passes, exact=use_exact(freeze(master)))
    own = freeze(master)
    rows: dict[str, list[Row]] = {}
    for way, how, model in (("cached", forward_passes, frozen), ("exact", partial(passes, exact=use_exact(own)), own)):
        served = serve(how, model, PROMPTS, batch=3, seed=1, new_tokens=20)
        rows[way] = list(rows_of(case, {"way": way}, served, master, in_double(frozen)))
    largest = {way: only_row(each, "difference", "largest") for way, each in rows.items()}
    assert largest["exact"] == 0 < largest["cached"] < 1e-4
    assert only_row(rows["exact"], "equal", None) == 1
    nearer = [float(r.value or 0) for r in rows["exact"] if r.quantity == "distance from fp64"]
    assert nearer[0] == nearer[1] > 0


def only_row(rows: list[Row], quantity: str, statistic: str | None) -> float:
    (found,) = [row.value for row in rows if row.quantity == quantity and row.conditions.get("statistic") == statistic]
    assert found is not None
    return float(found)


def test_a_greedy_text_parts_where_another_token_was_put(pair: tuple[GPT, GPT]) -> None:
    master, frozen = pair
    greedy = serve(forward_passes, frozen, PROMPTS, batch=3, seed=1, new_tokens=10, temperature=0)
    likeliest = Likeliest(master)
    assert agreed(greedy, likeliest) == 10
    greedy.texts[1][4 + 6] = (greedy.texts[1][4 + 6] + 1) % 61
    assert agreed(greedy, likeliest) == 6


def test_texts_of_unlike_lengths_are_scored_each_by_its_own_tokens(pair: tuple[GPT, GPT]) -> None:
    served = Served()
    served.add([1, 2], [3, 4, 5], [0.0] * 3)
    served.add([1], [6], [0.0])
    own = served.own(forward_logits(pair[0], served.texts))
    assert [len(each) for each in own] == [3, 1]
    alone = pair[0](torch.tensor([[1, *[0] * 31]]))[0, :1]
    assert torch.equal(own[1], alone)
