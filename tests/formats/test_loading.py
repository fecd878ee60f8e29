"""What is read back, and what of it is refused: earlier formats, damage, forgery, tokenizers."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats import loading
from isoforward.formats.export import export
from isoforward.formats.loading import load, load_export
from tests.formats.exports import TINY, logits, reseal, trained
from tests.formats.test_export import LLAMA_3, SHAPES

# Earlier and future versions


def test_an_export_of_version_0_1_0_loads(tmp_path: Path) -> None:
    """Written here by hand: whatever becomes of `export`, these files must still be read."""
    model = trained(replace(TINY, layers=1))
    ours = model.state_dict()
    at, to = "blocks.0.", "transformer.h.0."
    tensors = {
        "transformer.wte.weight": ours["embedding.weight"],
        "transformer.wpe.weight": ours["positions.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
        f"{to}ln_1.weight": ours[f"{at}attention_norm.weight"],
        f"{to}ln_1.bias": ours[f"{at}attention_norm.bias"],
        f"{to}attn.c_attn.weight": ours[f"{at}attention.qkv.weight"].T,
        f"{to}attn.c_attn.bias": ours[f"{at}attention.qkv.bias"],
        f"{to}attn.c_proj.weight": ours[f"{at}attention.out.weight"].T,
        f"{to}attn.c_proj.bias": ours[f"{at}attention.out.bias"],
        f"{to}ln_2.weight": ours[f"{at}mlp_norm.weight"],
        f"{to}ln_2.bias": ours[f"{at}mlp_norm.bias"],
        f"{to}mlp.c_fc.weight": ours[f"{at}mlp.up.weight"].T,
        f"{to}mlp.c_fc.bias": ours[f"{at}mlp.up.bias"],
        f"{to}mlp.c_proj.weight": ours[f"{at}mlp.down.weight"].T,
        f"{to}mlp.c_proj.bias": ours[f"{at}mlp.down.bias"],
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    manifest = {
        "format": 1,
        "isoforward": "0.1.0",
        "model": {"family": "gpt2", "layers": 1, "heads": 4, "width": 32, "context": 32, "vocab": 96},
        "files": {"model.safetensors": "", "config.json": ""},
        "sha256": "",
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    reseal(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_an_export_of_a_future_format_is_refused_with_both_versions(exported: Path) -> None:
    reseal(exported, format=2, isoforward="9.8.7")
    with pytest.raises(
        Integrity, match=r"format 2, of isoforward '9\.8\.7'; this is isoforward 0\.\S+ which reads format 1"
    ):
        load(exported)


# Damage and forgery


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_flipped_bit_is_noticed_and_its_file_named(name: str, tmp_path: Path) -> None:
    export(trained(), tmp_path / "export", tokenizer=Tokenizer.from_characters(["abc"]))
    file = tmp_path / "export" / name
    whole = file.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(Integrity, match=name):
            load(tmp_path / "export")
    file.unlink()
    with pytest.raises(Integrity, match=name):
        load(tmp_path / "export")


def test_no_bit_of_the_manifest_can_flip_and_change_what_it_says(exported: Path) -> None:
    file = exported / "manifest.json"
    whole = file.read_bytes()
    before, unchanged = loading.read_manifest(exported), 0
    for bit in range(0, 8 * len(whole), 11):  # 11 is coprime to 8: every kind of bit, in every place
        place, mask = bit // 8, 1 << bit % 8
        file.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            assert loading.read_manifest(exported) == before
            unchanged += 1
        except Integrity:
            pass
    assert unchanged < 3  # 1e-05 and 1E-05 are one number


def test_a_file_cut_at_any_sixteenth_is_refused(exported: Path) -> None:
    file = exported / "model.safetensors"
    whole = file.read_bytes()
    for sixteenth in range(16):
        file.write_bytes(whole[: len(whole) * sixteenth // 16])
        with pytest.raises(Integrity, match=r"model\.safetensors"):
            load(exported)
        reseal(exported)
        with pytest.raises(Integrity, match=r"model\.safetensors"):
            load(exported)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_target_", "os.system", "_target_"),
        ("typo", 1, "typo"),
        ("layers", "2", "layers"),
        ("layers", None, "layers"),
        ("layers", 2_000_000, "layers"),
        ("width", 10**400, "width"),
        ("rope_theta", 10**400, "rope_theta"),
        ("norm_eps", float("nan"), "norm_eps"),
        ("context", 2**40, "context"),
        ("tied", 1, "tied"),
        ("family", ["gpt2"], "family"),
        ("family", "mamba", "family"),
        ("rope_scaling", {"factor": 8.0}, "rope_scaling"),
        ("rope_scaling", LLAMA_3 | {"low_freq_factor": 4.0}, "rope_scaling"),
        ("source", "hf", "source"),
    ],
)
def test_a_forged_model_section_is_refused_by_its_schema(key: str, value: object, message: str, exported: Path) -> None:
    model = json.loads((exported / "manifest.json").read_text())["model"]
    reseal(exported, model=model | {key: value})
    with pytest.raises(Integrity, match=message):
        load(exported)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "a" * 300, "nul\0"])
def test_a_manifest_cannot_lead_out_of_its_directory(name: str, exported: Path) -> None:
    (exported.parent / "outside").write_text("")
    files = json.loads((exported / "manifest.json").read_text())["files"]
    reseal(exported, files=files | {name: hashlib.sha256().hexdigest()})
    with pytest.raises(Integrity, match="missing"):
        load(exported)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_config_of_anything_is_read_or_refused(data: st.DataObject) -> None:
    from isoforward.formats.transformers_format import from_transformers, to_transformers

    config = to_transformers(SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))], torch.float32, None)
    config |= {key: data.draw(JSON) for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3))}
    try:
        read = from_transformers(config)
    except BadInput as error:
        assert len(str(error)) < 500
    else:
        assert isinstance(read, ModelConfig)


# Tokenizers


def test_the_tokenizer_travels_with_the_weights(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_characters(["To be, or not to be"])
    export(trained(), tmp_path / "export", tokenizer=tokenizer)
    model, read = load_export(tmp_path / "export")
    assert read.sha256 == tokenizer.sha256
    assert torch.equal(logits(model), logits(trained()))


@pytest.mark.parametrize(
    ("declared", "end"), [(7, 7), ([9, 7], 9), (None, 0), (10**6, 0), (-1, 0), (2**40, 0), ("7", 0), ([], 0)]
)
def test_a_models_own_end_of_text_wins_over_that_of_its_tokenizer(declared: object, end: int, tmp_path: Path) -> None:
    export(trained(), tmp_path / "export", tokenizer=Tokenizer.from_characters(["abcdefghijk"]))
    (tmp_path / "export" / "manifest.json").unlink()  # as a directory of Transformers
    config = tmp_path / "export" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": declared}))
    assert loading.load_tokenizer(tmp_path / "export").end == end


def test_another_tokenizer_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    export(trained(), tmp_path / "export", tokenizer=Tokenizer.from_characters(["abc"]))
    Tokenizer.from_characters(["xyz"]).save(tmp_path / "export" / "tokenizer.json")
    with pytest.raises(Integrity, match=r"tokenizer\.json"):
        load_export(tmp_path / "export")


def test_a_tokenizer_larger_than_the_model_is_refused_and_nothing_written(tmp_path: Path) -> None:
    large = Tokenizer.from_characters(["".join(map(chr, range(200, 300)))])
    with pytest.raises(BadInput, match="101 tokens, the model only 96"):
        export(trained(), tmp_path / "export", tokenizer=large)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_the_manifest_does_not_know_is_not_used(exported: Path) -> None:
    Tokenizer.from_characters(["abc"]).save(exported / "tokenizer.json")
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        load_export(exported)


# Numbers


def test_numbers_whose_sum_overflows_are_finite() -> None:
    assert loading.is_finite(torch.full((9,), 3e38))
