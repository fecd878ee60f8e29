"""Exact decoding has the bits of training's forward, over sequences as long as the context."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isoforward.base.config import GenerateConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.model.gpt import GPT
from isoforward.serve import exact
from isoforward.serve.decoding import Sampling, forward_passes
from isoforward.serve.exact import ExactKVCache, fewest_rows, use_exact
from isoforward.serve.inference import load
from isoforward.serve.speculative import speculative_passes
from tests.conftest import SHAPES, lively, tiny

DTYPES = [torch.float32, torch.bfloat16]
MODELS: dict[object, tuple[GPT, GPT, int]] = {}


def models(config: ModelConfig, dtype: torch.dtype) -> tuple[GPT, GPT, int]:
    """The model in training, its frozen one prepared for exact serving, and its rows."""
    key = (str(config), dtype)
    if key not in MODELS:
        master = lively(GPT(config, dtype=dtype)).train()
        frozen = freeze(master)
        MODELS[key] = (master, frozen, use_exact(frozen))
    return MODELS[key]


def differing(
    master: GPT, frozen: GPT, rows: int, prompts: list[list[int]], new_tokens: int, passes: Any = forward_passes
) -> int:
    """Logits served that are not those of training's forward on the same tokens, padded to the context."""
    texts = [list(prompt) for prompt in prompts]
    served: list[list[Tensor]] = [[] for _ in prompts]
    for step in passes(frozen, prompts, max_new_tokens=new_tokens, sampling=Sampling(seed=3), exact=rows):
        for i, (row, token) in enumerate(zip(step.rows, step.tokens, strict=True)):
            served[row].append(step.logits[i])
            texts[row].append(token)
    context = master.config.context
    batch = torch.tensor([text[:context] + [0] * (context - len(text)) for text in texts])
    logits = master(batch).detach()  # (B, context, V), gradients on
    return sum(
        int((one != logits[row, len(prompts[row]) - 1 + at]).sum())
        for row, each in enumerate(served)
        for at, one in enumerate(each)
    )


def prompts_of(lengths: list[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [7], [32], [5] * 4, [3, 9, 1, 14, 2], [4] * 17], ids=str)
def test_every_family_serves_the_bits_of_training(config: ModelConfig, dtype: torch.dtype, lengths: list[int]) -> None:
    prompts = prompts_of(lengths, config.vocabulary)
    assert differing(*models(config, dtype), prompts, new_tokens=33) == 0


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=20),
    shape=st.sampled_from(list(SHAPES.values())),
    dtype=st.sampled_from(DTYPES),
)
def test_any_batch_of_any_lengths_does(lengths: list[int], shape: dict[str, Any], dtype: torch.dtype) -> None:
    config = tiny(**shape)
    assert differing(*models(config, dtype), prompts_of(lengths, 61), new_tokens=6) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lengths_across_the_blocks_of_attention_do(family: str, dtype: torch.dtype) -> None:
    """torch's attention takes queries in blocks of 32, 64 or 256, and keys in blocks of 512."""
    config = ModelConfig(family=family, layers=1, heads=2, width=64, context=1024, vocab=64)
    prompts = prompts_of([31, 63, 255, 510, 1020], 64)
    assert differing(*models(config, dtype), prompts, new_tokens=6) == 0


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 32),
    draft_tokens=st.integers(1, 9),
    good=st.booleans(),
    shape=st.sampled_from(list(SHAPES.values())),
    dtype=st.sampled_from(DTYPES),
)
def test_what_a_draft_proposes_is_verified_with_the_bits_of_training(
    length: int, draft_tokens: int, good: bool, shape: dict[str, Any], dtype: torch.dtype
) -> None:
    """`good`: a draft that is right nearly always; the other nearly never."""
    config = tiny(**shape)
    master, frozen, rows = models(config, dtype)
    draft = freeze(master) if good else freeze(lively(GPT(config, dtype=dtype)))
    passes = partial(speculative_passes, draft=draft, draft_tokens=draft_tokens)
    assert differing(master, frozen, rows, prompts_of([length], 61), 33, passes) == 0


def test_padding_to_whole_rows_is_no_position_that_a_pass_could_see() -> None:
    _, frozen, rows = models(tiny(), torch.float32)
    how: dict[str, Any] = {"max_new_tokens": 3, "sampling": Sampling(temperature=0), "exact": rows}
    assert rows > 1
    for passes in (forward_passes, partial(speculative_passes, draft=frozen, draft_tokens=1)):
        assert next(passes(frozen, [[1]], **how)).context == 1
    alone = list(forward_passes(frozen, [[1], [1, 2, 3]], **how))
    assert [step.context for step in alone] == [3, 4, 5]
    ends = {alone[0].tokens[1]}  # the longer row has ended, and the other is as long as itself alone
    left = [step for step in forward_passes(frozen, [[1], [1, 2, 3]], **how, ends=ends) if step.rows == [0]]
    assert [step.context for step in left] == [2, 3][: len(left)]


def test_padding_that_is_read_again_beside_proposals_is_in_nobodys_way() -> None:
    master, frozen, rows = models(tiny(context=14), torch.float32)
    passes = partial(speculative_passes, draft=freeze(master), draft_tokens=12)
    for length in range(1, 15):
        assert differing(master, frozen, rows, prompts_of([length], 61), 15, passes) == 0


def test_a_draft_changes_no_exact_greedy_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_characters(["the king\n"])
    place = export(lively(GPT(tiny(vocab=tokenizer.vocabulary))), tmp_path / "export", tokenizer=tokenizer)
    with_draft, alone = load(place, exact=True, draft=place), load(place, exact=True)
    for prompt in ("the king", "k"):
        texts = [one.generate(prompt, max_new_tokens=30, temperature=0) for one in (with_draft, alone)]
        assert texts[0] == texts[1]


def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "product_of_rows", lambda rows, x, weight, bias: F.linear(x, weight, bias))


def one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "attend_rows", lambda rows, *qkv, **how: F.scaled_dot_product_attention(*qkv, **how))


def keys_at_their_place_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    append = ExactKVCache.append

    def shifted(self: ExactKVCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = append(self, layer, keys, values)
        return keys.roll(1, dims=2), values.roll(1, dims=2)

    monkeypatch.setattr(ExactKVCache, "append", shifted)


@pytest.mark.parametrize("mutate", [plain_products, one_query, keys_at_their_place_in_the_batch])
def test_a_mutation_is_noticed(mutate: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(layers=2, context=64, vocab=61)
    rows = models(config, torch.float32)[2]
    monkeypatch.setattr(exact, "fewest_rows", lambda *_: rows)
    mutate(monkeypatch)
    master = models(config, torch.float32)[0]
    frozen = freeze(master)
    assert differing(master, frozen, use_exact(frozen), prompts_of([5, 9], 61), new_tokens=40) > 0


def test_a_kernel_that_stands_in_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = F.linear

    def other_bits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        return y + 1e-6 if weight.shape == (32, 128) and x.dim() == 2 and len(x) < 100 else y

    monkeypatch.setattr(F, "linear", other_bits)
    with pytest.raises(BadInput, match="the product with 32 x 128 of 32 rows or fewer has other bits"):
        fewest_rows(tiny(), torch.float32)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"precision": "int8"}, "rounded weights are another forward"),
        ({"compile": True}, "a compiler orders sums anew"),
        ({"lora": "x"}, "low-rank maps"),
        ({"device": "cuda"}, "never compared"),
    ],
)
def test_where_it_cannot_be_had_it_is_refused_by_name(asked: dict[str, Any], why: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_characters(["the king\n"])
    place = export(GPT(tiny(vocab=tokenizer.vocabulary)), tmp_path / "export", tokenizer=tokenizer)
    with pytest.raises(BadInput, match=f"exact=true cannot be had with {next(iter(asked))}.*{why}"):
        load(place, exact=True, **asked)
    with pytest.raises(BadInput, match="leave out cache=false"):
        GenerateConfig(exact=True, cache=False)


def test_a_module_that_is_loaded_exact_serves_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_characters(["the king\n"])
    master = lively(GPT(tiny(vocab=tokenizer.vocabulary)))
    module = load(export(master, tmp_path / "export", tokenizer=tokenizer), exact=True)
    row = module.complete([module.encode("the king")], max_new_tokens=20, logprobs=True)[0]
    text = [*module.encode("the king"), *row.tokens]
    logprobs = master.eval()(torch.tensor([[*text, *[0] * (32 - len(text))]])).detach().double().log_softmax(-1)[0]
    assert row.logprobs == [float(logprobs[7 + i, token]) for i, token in enumerate(row.tokens)]


def test_an_order_of_sums_that_bf16_all_but_hides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of fewer than 16 rows add up their halves first."""

    def ordered(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        half = x.shape[-1] // 2 if x.shape[0] < 16 else 0
        x, w = x.double().float(), weight.float()
        y = x[..., :half] @ w[:, :half].T + x[..., half:] @ w[:, half:].T
        return (y if bias is None else y + bias).to(weight.dtype)

    monkeypatch.setattr(F, "linear", ordered)
    assert fewest_rows(tiny(family="llama"), torch.bfloat16) == 16
