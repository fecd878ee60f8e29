from pathlib import Path

import pytest
import torch

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.model.gpt import GPT
from isoforward.serve.continuation import overlap
from isoforward.serve.decoding import Sampling, forward_passes
from isoforward.serve.inference import InferenceModule, load
from tests.conftest import lively, tiny

GREEDY = Sampling(temperature=0)


@pytest.fixture
def module() -> InferenceModule:
    tokenizer = Tokenizer.from_characters(["the quick brown fox jumps over the lazy dog.\n"])
    return InferenceModule(freeze(lively(GPT(tiny(vocab=tokenizer.vocabulary)))), tokenizer)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_temperature_of_zero_takes_the_likeliest() -> None:
    assert GREEDY.choose(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]]), generator()).tolist() == [1, 0]


def test_sampling_follows_the_probabilities() -> None:
    """10 000 draws of 3 outcomes: each share within 5 standard errors of its probability."""
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    logits = (probabilities.log() * 0.5).repeat(10_000, 1)
    drawn = Sampling(temperature=0.5).choose(logits, generator())
    shares = torch.bincount(drawn, minlength=3) / 10_000
    assert ((shares - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / 10_000).sqrt()).all()


def test_top_k_never_leaves_the_likeliest_k() -> None:
    logits = torch.arange(10.0).repeat(1000, 1)
    assert set(Sampling(temperature=9, top_k=3).choose(logits, generator()).tolist()) == {7, 8, 9}


@pytest.mark.parametrize(
    ("top_p", "left"), [(0.5, {0}), (0.6, {0, 1}), (0.8, {0, 1}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, left: set[int]) -> None:
    logits = torch.tensor([0.5, 0.35, 0.15]).log().repeat(2000, 1)
    assert set(Sampling(temperature=1, top_p=top_p).choose(logits, generator()).tolist()) == left


def test_the_same_seed_gives_the_same_text_and_another_does_not(module: InferenceModule) -> None:
    texts = [module.generate("the", seed=seed, max_new_tokens=20) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_with_and_without_a_cache_the_text_is_the_same(module: InferenceModule) -> None:
    assert module.generate("the", temperature=0, max_new_tokens=20) == module.generate(
        "the", temperature=0, max_new_tokens=20, cache=False
    )


def test_text_ends_before_stop_wherever_its_letters_fall(module: InferenceModule) -> None:
    whole = str(module.generate("the", temperature=0, max_new_tokens=25))
    for start in range(1, len(whole) - 2):
        stop = whole[start : start + 3]
        assert module.generate("the", temperature=0, max_new_tokens=25, stop=stop) == whole.partition(stop)[0]


def test_what_is_streamed_is_what_is_generated(module: InferenceModule) -> None:
    pieces = [text for text, _ in module.stream("the", max_new_tokens=20, sampling=GREEDY)]
    assert "".join(pieces) == module.generate("the", temperature=0, max_new_tokens=20)
    assert len(pieces) > 10


def test_generation_is_one_forward_after_another(module: InferenceModule) -> None:
    ids = module.encode("the ")
    passes = list(forward_passes(module.model, [ids], max_new_tokens=5, sampling=GREEDY))
    assert [step.context for step in passes] == [4, 5, 6, 7, 8]
    for step in passes:
        logits = module(torch.tensor([ids]))[0, -1]
        torch.testing.assert_close(step.logits[0], logits, atol=1e-5, rtol=1e-4)
        assert step.tokens == [logits.argmax().item()]
        ids = [*ids, *step.tokens]


def test_generation_ends_where_the_context_is_full(module: InferenceModule) -> None:
    assert len(list(forward_passes(module.model, [[1] * 30], max_new_tokens=100, sampling=GREEDY))) == 3
    assert len(list(forward_passes(module.model, [[1] * 32], max_new_tokens=100, sampling=GREEDY))) == 1


def test_a_prompt_longer_than_the_context_is_refused(module: InferenceModule) -> None:
    with pytest.raises(BadInput, match="33 tokens and the model's context holds 32"):
        module.generate("t" * 33)


def test_no_token_asked_for_is_no_token(module: InferenceModule) -> None:
    assert module.generate("the", max_new_tokens=0) == ""


def test_an_empty_prompt_begins_a_document(module: InferenceModule) -> None:
    if module.tokenizer.end is None:
        with pytest.raises(BadInput, match="the prompt is empty"):
            module.generate("")
    else:
        assert module.encode("") == [module.tokenizer.end]
        assert isinstance(module.generate("", max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("abc", "cd", 1), ("abc", "bcd", 2), ("abc", "x", 0), ("aa", "aaa", 2)]
)
def test_the_end_of_a_text_may_begin_stop(text: str, stop: str, length: int) -> None:
    assert overlap(text, stop) == length


def test_a_run_directory_and_its_export_load_the_same(module: InferenceModule, tmp_path: Path) -> None:
    export(module.model, tmp_path / "run" / "export", tokenizer=module.tokenizer)
    texts = [load(path).generate("the", temperature=0) for path in (tmp_path / "run", tmp_path / "run" / "export")]
    assert texts == [module.generate("the", temperature=0)] * 2


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no export"):
        load(tmp_path)
