"""Against the large model alone: the same distribution, and the same greedy text."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from isoforward.base.errors import BadInput, Integrity
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import freeze
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import Pass, Sampling, forward_passes
from isoforward.serve.inference import InferenceModule
from isoforward.serve.speculative import accept, speculative_passes
from tests.conftest import lively, tiny

V = 5


def random_model(seed: int, **more: object) -> GPT:
    torch.manual_seed(seed)
    model = GPT(tiny(**{"layers": 1, "vocab": V, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return freeze(model)


@pytest.fixture(scope="module")
def large() -> GPT:
    return random_model(0)


@pytest.fixture(scope="module")
def small() -> GPT:
    return random_model(1, width=16)


def tokens_of(passes: Iterable[Pass]) -> list[int]:
    return [token for step in passes for token in step.tokens]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def largest(freedom: int) -> float:
    """The quantile 0.9999 of chi-square, after Wilson and Hilferty 1931."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_proposal_is_accepted_and_replaced_so_that_what_is_left_has_the_wanted_distribution() -> None:
    """Leviathan 2023, appendix A.1."""
    wanted = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    chance = torch.tensor([0.4, 0.1, 0.3, 0.0, 0.2])
    generator = torch.Generator().manual_seed(3)
    proposed = torch.multinomial(chance, 10_000, replacement=True, generator=generator).tolist()
    both = torch.stack((wanted, torch.full((V,), 1 / V)))
    first = [accept(both, [chance], [token], generator)[0] for token in proposed]
    counts = torch.bincount(torch.tensor(first), minlength=V).double()
    assert chi_square(counts, wanted.double() * 10_000) < largest(V - 1)


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 4, "top_p": 0.95}])
def test_tokens_have_the_distribution_of_the_large_model_alone(large: GPT, small: GPT, how: dict[str, Any]) -> None:
    """Pairs of the second and third token, which are proposed and checked, against the large model's own forward."""
    prompt, n = [1, 2, 3], 800

    def after(*tokens: int) -> torch.Tensor:
        return Sampling(**how).probabilities(large(torch.tensor([[*prompt, *tokens]]))[0, -1]).double()

    pairs = [after()[a] * torch.stack([after(a)[b] * after(a, b) for b in range(V)]) for a in range(V)]
    expected = torch.stack(pairs).sum(0).flatten() * n
    counts = torch.zeros(V, V, dtype=torch.double)
    for seed in range(n):
        sampling = Sampling(seed=seed, **how)
        passes = speculative_passes(large, [prompt], draft=small, draft_tokens=2, max_new_tokens=4, sampling=sampling)
        _, second, third, _ = tokens_of(passes)
        counts[second, third] += 1
    assert counts.flatten()[expected == 0].sum() == 0
    likely = expected > 5
    assert chi_square(counts.flatten()[likely], expected[likely]) < largest(int(likely.sum()))


@pytest.mark.parametrize("draft_tokens", [1, 3, 8])
def test_at_a_temperature_of_zero_the_text_is_the_greedy_one(large: GPT, small: GPT, draft_tokens: int) -> None:
    greedy = Sampling(temperature=0)
    for prompt in ([1], [4, 2, 0], [3] * 20):
        alone = tokens_of(forward_passes(large, [prompt], max_new_tokens=40, sampling=greedy))
        found = speculative_passes(
            large, [prompt], draft=small, draft_tokens=draft_tokens, max_new_tokens=40, sampling=greedy
        )
        assert tokens_of(found) == alone


def test_a_draft_that_is_the_model_itself_is_always_right(large: GPT) -> None:
    """Each forward of the large model then gives draft_tokens + 1 tokens: 1 + 2 x 4 + 3."""
    for sampling in (Sampling(temperature=0), Sampling(temperature=1.0)):
        passes = speculative_passes(large, [[1, 2]], draft=large, draft_tokens=3, max_new_tokens=12, sampling=sampling)
        assert [len(step.tokens) for step in passes] == [1, 4, 4, 3]


def test_a_pass_says_how_many_positions_it_could_see_proposals_among_them(large: GPT) -> None:
    greedy = Sampling(temperature=0)
    passes = speculative_passes(large, [[1, 2]], draft=large, draft_tokens=3, max_new_tokens=12, sampling=greedy)
    assert [step.context for step in passes] == [2, 3 + 3, 7 + 3, 11 + 2]


def test_both_caches_hold_what_the_text_says_after_refused_proposals(large: GPT, small: GPT) -> None:
    """Logits of every pass against the full forward over the text so far."""
    text = [1, 2]
    refused = 0
    for step in speculative_passes(
        large, [text.copy()], draft=small, draft_tokens=3, max_new_tokens=20, sampling=Sampling(temperature=1.0)
    ):
        for token, logits in zip(step.tokens, step.logits, strict=True):
            torch.testing.assert_close(logits, large(torch.tensor([text]))[0, -1], atol=1e-5, rtol=1e-4)
            text.append(token)
        refused += len(step.tokens) < 4
    assert refused > 2


def test_text_ends_with_its_end_and_no_token_later(large: GPT, small: GPT) -> None:
    greedy = Sampling(temperature=0)
    alone = tokens_of(forward_passes(large, [[1]], max_new_tokens=30, sampling=greedy))
    for end in set(alone):
        found = speculative_passes(
            large, [[1]], draft=small, draft_tokens=4, max_new_tokens=30, sampling=greedy, ends={end}
        )
        assert tokens_of(found) == [*itertools.takewhile(end.__ne__, alone), end]


def test_no_position_is_asked_for_beyond_either_context(large: GPT) -> None:
    short = random_model(1, context=16)
    found = speculative_passes(
        large, [[1] * 30], draft=large, draft_tokens=8, max_new_tokens=50, sampling=Sampling(temperature=0)
    )
    assert len(tokens_of(found)) == 3
    with pytest.raises(BadInput, match="draft: 19 positions do not fit its context of 16"):
        list(speculative_passes(large, [[1] * 10], draft=short, draft_tokens=2, max_new_tokens=10, sampling=Sampling()))


def test_a_draft_of_another_tokenizer_is_refused_though_it_has_as_many_tokens() -> None:
    one, other = (Tokenizer.from_characters([letters]) for letters in ("abc", "abd"))
    model = freeze(lively(GPT(tiny(vocab=one.vocabulary))))
    with pytest.raises(Integrity, match="tokenizer is another"):
        InferenceModule(model, one, draft=InferenceModule(model, other))


def test_a_module_with_a_draft_writes_the_text_of_one_without() -> None:
    tokenizer = Tokenizer.from_characters(["the quick brown fox jumps over the lazy dog.\n"])
    model = freeze(lively(GPT(tiny(vocab=tokenizer.vocabulary))))
    draft = InferenceModule(freeze(lively(GPT(tiny(vocab=tokenizer.vocabulary, layers=1)))), tokenizer)
    alone, faster = InferenceModule(model, tokenizer), InferenceModule(model, tokenizer, draft=draft, draft_tokens=3)
    assert faster.generate("the", temperature=0, max_new_tokens=25) == alone.generate(
        "the", temperature=0, max_new_tokens=25
    )


@pytest.mark.parametrize("broken", ["model", "draft"])
def test_logits_that_are_not_finite_are_refused(broken: str) -> None:
    models = {"model": random_model(0), "draft": random_model(1)}
    with torch.no_grad():
        models[broken].get_parameter("norm.weight")[0] = float("nan")
    with pytest.raises(BadInput, match=r"the model's norm\.weight is not"):
        list(
            speculative_passes(
                models["model"], [[1]], draft=models["draft"], draft_tokens=2, max_new_tokens=6, sampling=Sampling()
            )
        )
