from typing import Any

import pytest
import torch
from torch import Tensor

from isoforward.base.config import ModelConfig
from isoforward.base.device import CpuDevice
from isoforward.base.errors import BadInput
from isoforward.formats.export import freeze
from isoforward.model.gpt import GPT, Linear
from isoforward.serve.decoding import FEW, Sampling, draw, forward_passes, nucleus
from tests.conftest import lively, tiny

GREEDY = Sampling(temperature=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_has_no_probability_is_never_drawn_and_the_rest_in_proportion() -> None:
    """20 000 draws of 2 outcomes in 5: within 5 standard errors."""
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(20_000, -1)
    drawn = torch.bincount(draw(probabilities, generator()), minlength=5)
    assert drawn[[0, 2, 4]].sum() == 0
    assert abs(drawn[1] / 20_000 - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.01, 4.0])  # nearly all of the vocabulary is needed, or a few tokens of it
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_sorted_one(top_p: Any, sharpness: Any) -> None:
    """Holtzman 2020, eq. 2, written out over a sorted vocabulary."""
    probabilities = (torch.randn(2, 4 * FEW, generator=generator()) * sharpness).double().softmax(-1)
    found, ids = nucleus(probabilities, top_p)
    for row, kept in zip(probabilities, torch.zeros_like(probabilities).scatter(-1, ids, found), strict=True):
        chosen, mass = [], 0.0
        for token in row.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            chosen.append(token)
            mass += float(row[token])
        assert set(kept.nonzero().flatten().tolist()) == set(chosen)
        torch.testing.assert_close(kept[chosen], row[chosen] / mass)


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.6}])
def test_tokens_are_drawn_with_the_probabilities_that_are_told(how: Any) -> None:
    """20 000 draws: within 5 standard errors, and no token that has none."""
    logits = torch.randn(1, 4 * FEW, generator=generator(5)) * 4
    sampling = Sampling(temperature=0.9, **how)
    told = sampling.probabilities(logits)[0].double()
    assert abs(float(told.sum()) - 1) < 1e-5
    drawn = sampling.choose(logits.expand(20_000, -1), generator())
    shares = torch.bincount(drawn, minlength=4 * FEW).double() / 20_000
    assert (shares[told == 0] == 0).all()
    assert ((shares - told).abs() <= 5 * (told * (1 - told) / 20_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: Any) -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(3, 17, generator=generator())
    said = torch.randint(17, (3, 9), generator=generator())
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(said, logits.clone())
    assert torch.equal(Sampling(repetition_penalty=penalty).penalised(logits, said), expected)


def test_padding_counts_as_nothing_that_was_said() -> None:
    model = freeze(lively(GPT(tiny())))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    again = Sampling(temperature=0, repetition_penalty=1.5)
    together = next(forward_passes(model, prompts, max_new_tokens=1, sampling=again)).scores
    for prompt, scores in zip(prompts, together, strict=True):
        alone = next(forward_passes(model, [prompt], max_new_tokens=1, sampling=again)).scores[0]
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-4)


def test_a_finished_sequence_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go through a matrix product of each pass, counted."""
    model = freeze(lively(GPT(tiny())))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    whole = [step.tokens for step in forward_passes(model, prompts, max_new_tokens=10, sampling=GREEDY)]
    end = whole[3][1]  # of the second sequence after four tokens; the others may end with it, too
    ends_at = [next((i for i, step in enumerate(whole) if step[row] == end), 9) for row in range(3)]
    rows = []
    product = Linear.forward

    def counted(self: Linear, x: Tensor) -> Tensor:
        rows.append(x.numel() // self.in_features)
        return product(self, x)

    monkeypatch.setattr(Linear, "forward", counted)
    list(forward_passes(model, prompts, max_new_tokens=10, sampling=GREEDY, ends={end}))
    products = 4 * model.config.layers + 1
    decoded = [sum(at >= step for at in ends_at) for step in range(1, 1 + max(ends_at))]
    assert min(decoded) < 3
    assert rows[products:] == [alive for alive in decoded for _ in range(products)]


def test_logits_are_made_of_the_last_position_of_a_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = freeze(lively(GPT(tiny())))
    shapes = []
    head = GPT.head
    monkeypatch.setattr(GPT, "head", lambda self, hidden: shapes.append(tuple(hidden.shape)) or head(self, hidden))
    list(forward_passes(model, [[1] * 20, [2] * 9], max_new_tokens=3, sampling=GREEDY))
    assert shapes == [(2, 32)] * 3


def test_a_cache_larger_than_memory_is_refused_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = freeze(GPT(tiny()))
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda device: 30_000)
    monkeypatch.setattr(GPT, "trunk", lambda *_: pytest.fail("a forward ran"))
    # 2 layers x keys and values x 4 bytes x 32 features x 3 sequences x 20 positions
    with pytest.raises(BadInput, match=r"3 x 20 positions takes 30\.0 KiB and 29\.3 KiB are free"):
        list(forward_passes(model, [[1] * 15] * 3, max_new_tokens=5, sampling=GREEDY))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_one_row_gives_what_the_same_row_gives_among_others(
    config: ModelConfig, dtype: torch.dtype, tolerance: Any
) -> None:
    """One row goes through a product with a vector, several through one of matrices."""
    model = freeze(lively(GPT(config, dtype=dtype)))
    tokens = torch.tensor([[5], [7]])
    torch.testing.assert_close(model(tokens[:1]), model(tokens)[:1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_in_training_gives_the_bits_and_gradients_of_serving_it(
    config: ModelConfig, dtype: torch.dtype
) -> None:
    model = lively(GPT(config, dtype=dtype))
    logits = model(torch.tensor([[5]]))
    with torch.inference_mode():
        assert torch.equal(freeze(model)(torch.tensor([[5]])), logits)
    logits.square().mean().backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(torch.tensor([[5], [5]])).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in alone and parameter.grad is not None:
            bound = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype] * float(parameter.grad.abs().max())
            zero = 1e-7  # a query has no choice among one key: its norm's gradient is 0 but for rounding
            torch.testing.assert_close(alone[name], parameter.grad, atol=max(bound, zero), rtol=0)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)])
def test_logits_that_are_not_finite_are_refused_by_the_weight_that_makes_them(sampling: Sampling) -> None:
    model = freeze(GPT(tiny(family="llama")))
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(3e38)
    with pytest.raises(BadInput, match="not finite, though all weights are: float32 is too narrow"):
        list(forward_passes(model, [[1, 2]], max_new_tokens=2, sampling=sampling))
    with torch.no_grad():
        model.get_parameter("norm.weight")[3] = float("nan")
    with pytest.raises(BadInput, match=r"the logits are not finite, since the model's norm\.weight is not"):
        list(forward_passes(model, [[1, 2]], max_new_tokens=2, sampling=sampling))
