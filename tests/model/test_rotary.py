import pytest
import torch

from isoforward.base.config import ModelConfig
from isoforward.formats.export import freeze
from isoforward.model.gpt import GPT
from isoforward.model.rotary import Rotary, rotate
from tests.conftest import tiny

LLAMA = tiny(family="llama", head_dim=64)
YARN = {"type": "yarn", "factor": 4.0, "original_context": 512}
SCALINGS: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, given": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2**20,
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_is_that_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from isoforward.formats.transformers_format import from_transformers

    theirs = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters=SCALINGS[name] | {"rope_theta": 1e4},
    )
    positions = torch.arange(2048)
    cosine, sine = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    ours = Rotary(from_transformers(theirs.to_dict()))(positions, torch.float32)
    torch.testing.assert_close(ours, torch.cat((cosine, sine)), atol=3e-4, rtol=0)  # angles of 2048 have 2e-4 in fp32
    torch.testing.assert_close(ours[:, :16], torch.cat((cosine, sine))[:, :16], atol=3e-6, rtol=0)


def test_rotation_depends_on_distance_alone() -> None:
    """RoFormer, eq. 16: the product of a rotated query and key is a function of their distance."""
    table = Rotary(tiny(family="llama"))(torch.arange(32), torch.float32)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(m: int, n: int) -> torch.Tensor:
        return (rotate(q, table[:, m : m + 1]) * rotate(k, table[:, n : n + 1])).sum()

    torch.testing.assert_close(product(3, 1), product(20, 18))
    assert not torch.allclose(product(3, 1), product(3, 2))


def test_a_position_has_the_same_bits_whatever_is_computed_beside_it() -> None:
    rotary = Rotary(LLAMA)
    table = rotary(torch.arange(1024), torch.float32)
    for positions in (torch.arange(1), torch.arange(7, 20), torch.tensor([1023]), torch.tensor([[5, 6], [900, 901]])):
        found = rotary(positions, torch.float32)
        assert torch.equal(found.squeeze(2) if positions.dim() == 2 else found, table[:, positions])


def test_a_long_context_costs_nothing_before_it_is_used() -> None:
    """Its table of cosines and sines would take 256 MiB, its cache 2 GiB."""
    model = GPT(tiny(family="llama", head_dim=64, context=2**19))
    assert sum(buffer.nbytes for buffer in model.buffers()) == 4 * 32


@pytest.mark.parametrize("scaling", [None, YARN])
def test_frequencies_stay_fp32_whatever_the_model_is_cast_to(scaling: dict[str, object] | None) -> None:
    config = tiny(family="llama", head_dim=64, rope_scaling=scaling)
    expected = Rotary(config).frequencies
    model = GPT(config).to(torch.bfloat16)
    assert model.rotary is not None and torch.equal(model.rotary.frequencies, expected)
    frozen = freeze(GPT(config), dtype=torch.bfloat16)
    assert frozen.rotary is not None and torch.equal(frozen.rotary.frequencies, expected)


def test_scaling_of_before_its_type_was_named_is_llama_3s() -> None:
    old: dict[str, object] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 16}
    untyped, typed = (ModelConfig(family="llama", rope_scaling=each) for each in (old, old | {"type": "llama3"}))
    assert torch.equal(Rotary(untyped).frequencies, Rotary(typed).frequencies)
    assert not torch.equal(Rotary(untyped).frequencies, Rotary(ModelConfig(family="llama")).frequencies)
