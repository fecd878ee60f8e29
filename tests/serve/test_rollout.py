from dataclasses import replace

import pytest
import torch

from isoforward.base.config import ModelConfig
from isoforward.formats.export import freeze
from isoforward.model.gpt import GPT
from isoforward.model.grpo import answer_logprobs
from isoforward.serve.exact import use_exact
from isoforward.serve.rollout import roll_out
from tests.conftest import lively, tiny


def test_answers_come_with_the_log_probabilities_that_training_gives_them() -> None:
    """Within the tolerance of cached decode against the full forward in fp32; the last bits differ."""
    model = lively(GPT(tiny()))
    prompts = torch.randint(61, (4, 5), generator=torch.Generator().manual_seed(2))
    rolled = roll_out(freeze(model), prompts, new_tokens=9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(rolled.tokens[:, :5], prompts) and rolled.answers.shape == (4, 9)
    with torch.no_grad():
        trained = answer_logprobs(model, rolled)
    torch.testing.assert_close(rolled.logprobs, trained, atol=1e-5, rtol=1e-4)
    assert not rolled.tokens.is_inference()  # a backward may keep them


def test_answers_are_drawn_from_the_models_own_distribution() -> None:
    model = freeze(lively(GPT(tiny(vocab=5))))
    prompts = torch.tensor([[1, 2, 3]]).expand(4000, 3)
    rolled = roll_out(model, prompts, new_tokens=1, generator=torch.Generator().manual_seed(3))
    drawn = rolled.answers.flatten().bincount(minlength=5) / 4000
    wanted = model(prompts[:1])[0, -1].softmax(-1)
    error = (wanted * (1 - wanted) / 4000).sqrt()  # of a share, its standard deviation
    assert ((drawn - wanted).abs() < 4 * error).all()
    assert wanted.max() - wanted.min() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prompt", "new"), [(8, 16), (1, 32)])
def test_an_exact_rollout_has_the_bits_of_the_update(
    config: ModelConfig, dtype: torch.dtype, prompt: int, new: int
) -> None:
    """Of sequences as long as the context; as usual, in fp32, it has not."""
    model = lively(GPT(replace(config, context=prompt + new - 1), dtype=dtype))
    prompts = torch.randint(61, (12, prompt), generator=torch.Generator().manual_seed(2))
    apart = {}
    for exact in (False, True):
        served = freeze(model)
        rows = use_exact(served) if exact else 0
        generator = torch.Generator().manual_seed(3)
        rolled = roll_out(served, prompts, new_tokens=new, exact=rows, generator=generator)
        with torch.no_grad():
            trained = answer_logprobs(model, rolled)
        apart[exact] = int((rolled.logprobs != trained).sum())
    assert apart[True] == 0
    assert apart[False] > 0 or dtype == torch.bfloat16


def test_the_seed_gives_the_answers() -> None:
    model, prompts = freeze(lively(GPT(tiny()))), torch.ones(3, 4, dtype=torch.long)
    one, same, other = (
        roll_out(model, prompts, new_tokens=8, generator=torch.Generator().manual_seed(seed)).tokens
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
