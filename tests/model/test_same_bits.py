"""Training's forward and the frozen forward give the same bits; decode with a cache gives the same numbers.

Bitwise holds for the same shape, dtype, threads, machine and build. Cached decode runs other shapes through other
kernels and has a tolerance: 1e-5 absolute, 1e-4 relative in fp32, 2e-2 of both in bf16. Every claim fails under a small
mutation.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isoforward.base.config import ModelConfig
from isoforward.formats.export import export, freeze
from isoforward.formats.loading import load
from isoforward.model.gpt import GPT, KVCache
from isoforward.model.steps import decode, decode_uncached, prefill, train_step
from isoforward.serve.decoding import Sampling, forward_passes
from tests.conftest import lively, tiny

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
}


def trained(config: ModelConfig, dtype: torch.dtype, tokens: Tensor) -> GPT:
    model = lively(GPT(config, dtype=dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:])
    return model


def one_by_one(model: GPT, tokens: Tensor, start: int) -> Tensor:
    """Logits of every position from `start` on, (B, T - start + 1, V): prefill, then decode."""
    cache = KVCache(model.config, batch=len(tokens), capacity=tokens.shape[1], dtype=model.dtype)
    found = [prefill(model, tokens[:, :start], cache)]
    found += [decode(model, tokens[:, i : i + 1], cache) for i in range(start, tokens.shape[1])]
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_frozen_forward_gives_the_bits_of_training_forward(
    config: ModelConfig, dtype: torch.dtype, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = trained(config, dtype, tokens)
    logits = model.train()(tokens).detach()
    export(model, tmp_path / "export", tokenizer=None)
    for frozen in (freeze(model), load(tmp_path / "export")):
        with torch.inference_mode():
            assert torch.equal(frozen(tokens), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_freezing_halves_the_bytes_of_bf16_and_keeps_those_of_fp32(dtype: torch.dtype) -> None:
    model = GPT(tiny(), dtype=dtype)
    held = sum(p.nbytes for p in freeze(model).parameters())
    assert held == sum(p.nbytes for p in model.parameters()) // (2 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_with_a_cache_gives_the_logits_of_the_full_forward(
    config: ModelConfig, dtype: torch.dtype, tokens: torch.Tensor
) -> None:
    model = freeze(lively(GPT(config, dtype=dtype)))
    full = model(tokens)
    torch.testing.assert_close(one_by_one(model, tokens, 7), full[:, 6:], **TOLERANCE[dtype])


def test_decode_without_a_cache_is_the_full_forward_itself(config: ModelConfig, tokens: torch.Tensor) -> None:
    model = freeze(lively(GPT(config)))
    hidden = model.trunk(tokens)
    assert torch.equal(decode_uncached(model, tokens), model.head(hidden[:, -1]))


def test_several_tokens_after_a_past_see_it_and_not_their_future(config: ModelConfig, tokens: torch.Tensor) -> None:
    model = freeze(lively(GPT(config)))
    cache = KVCache(config, batch=len(tokens), capacity=20, dtype=torch.float32)
    prefill(model, tokens[:, :7], cache)
    hidden = model.trunk(tokens[:, 7:], cache)
    torch.testing.assert_close(model.head(hidden), model(tokens)[:, 7:], **TOLERANCE[torch.float32])


def test_prompts_of_unlike_lengths_give_as_one_batch_what_each_gives_alone(config: ModelConfig) -> None:
    model = freeze(lively(GPT(config)))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    greedy = Sampling(temperature=0)

    def continuations(batch: list[list[int]], **how: Any) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in batch]
        for step in forward_passes(model, batch, max_new_tokens=12, sampling=greedy, **how):
            for row, token in zip(step.rows, step.tokens, strict=True):
                found[row].append(token)
        return found

    alone = [continuations([prompt])[0] for prompt in prompts]
    assert continuations(prompts) == alone
    assert continuations(prompts, cache=False) == alone
    end = alone[0][4]  # a row that meets it leaves the batch; the others must not notice
    ended = [row[: row.index(end) + 1] if end in row else row for row in alone]
    assert continuations(prompts, ends=(end,)) == ended


def position_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = KVCache.positions
    monkeypatch.setattr(KVCache, "positions", lambda self, count: positions(self, count) + (self.length > 0))


def mask_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv, is_causal, **how: attend(*qkv, is_causal=False, **how)
    )


def last_layer_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    append = KVCache.append

    def stale(self: KVCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return append(self, max(0, layer - 1), keys, values)

    monkeypatch.setattr(KVCache, "append", stale)


def values_for_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    append = KVCache.append
    monkeypatch.setattr(KVCache, "append", lambda self, layer, k, v: append(self, layer, k, v)[::-1])


def causal_flag_in_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `is_causal` does where queries are fewer than keys: it aligns top-left."""
    attend = F.scaled_dot_product_attention

    def top_left(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool, **how: Any) -> Tensor:
        return attend(q, k, v, is_causal=True, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", top_left)


@pytest.mark.parametrize(
    "mutate", [position_off_by_one, mask_forgotten, last_layer_skipped, values_for_keys, causal_flag_in_decode]
)
def test_a_mutation_of_the_cached_path_is_noticed(
    mutate: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor
) -> None:
    model = freeze(lively(GPT(tiny())))
    full = model(tokens)[:, 6:]
    mutate(monkeypatch)
    assert not torch.allclose(one_by_one(model, tokens, 7), full, **TOLERANCE[torch.float32])


def test_one_weight_off_by_a_thousandth_is_noticed(tokens: torch.Tensor) -> None:
    model = lively(GPT(tiny()))
    logits = model(tokens).detach()
    frozen = freeze(model)
    with torch.no_grad():
        frozen.get_submodule("blocks.0.mlp.down").get_parameter("weight")[3, 5] *= 1.001
    with torch.inference_mode():
        assert not torch.equal(frozen(tokens), logits)


def test_a_dropped_layer_is_noticed(tokens: torch.Tensor) -> None:
    model = lively(GPT(tiny()))
    frozen = freeze(model)
    del frozen.blocks[1]
    with torch.inference_mode():
        assert not torch.equal(frozen(tokens), model(tokens))
