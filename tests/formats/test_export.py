import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput, Integrity, StorageFailed
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats import export as export_module
from isoforward.formats.export import export, fingerprint, freeze, load, load_export, load_trainable
from isoforward.model.gpt import GPT
from tests.formats.exports import TINY, TOKENS, in_child, logits, reseal, trained

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 16}
SHAPES = {
    "gpt2": TINY,
    "gpt2 beyond GPT-2": replace(TINY, bias=False, kv_heads=2, tied=False, ffn=48, dropout=0.1),
    "llama": replace(TINY, family="llama"),
    "llama 3": replace(TINY, family="llama", kv_heads=2, tied=False, bias=True, rope_theta=5e2, rope_scaling=LLAMA_3),
}


# The same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_served_has_the_bits_of_what_was_trained(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(SHAPES[shape], dtype)
    export(model, tmp_path / "export", tokenizer=None)
    loaded = load(tmp_path / "export")
    model.eval()  # one shape has dropout
    expected = model(TOKENS).detach()
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(freeze(model)), expected)
    assert loaded.config == model.config
    assert loaded.dtype == dtype and {p.dtype for p in loaded.parameters()} == {dtype}
    assert all(p.is_contiguous() and not p.requires_grad for p in loaded.parameters())
    assert not loaded.training


def test_a_frozen_model_does_not_follow_further_training() -> None:
    model = trained()
    frozen, before = freeze(model), logits(model)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    assert torch.equal(logits(frozen), before)


def test_the_fingerprint_is_the_same_in_both_lives_and_moves_with_any_weight(tmp_path: Path) -> None:
    model = trained(dtype=torch.bfloat16)
    export(model, tmp_path / "export", tokenizer=None)
    manifest = export_module.read_manifest(tmp_path / "export")
    assert manifest is not None
    named = manifest["fingerprint"]
    assert fingerprint(model) == fingerprint(freeze(model)) == fingerprint(load(tmp_path / "export")) == named
    for parameter in model.parameters():
        before = fingerprint(model)
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        assert fingerprint(model) != before


def test_loading_draws_nothing_from_the_random_generator(exported: Path) -> None:
    state = torch.get_rng_state()
    load(exported)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_export_can_be_opened_in_another_dtype(exported: Path) -> None:
    assert torch.equal(logits(load(exported, dtype=torch.bfloat16)), logits(freeze(trained(), dtype=torch.bfloat16)))


def test_training_goes_on_from_fp32_masters(tmp_path: Path) -> None:
    export(trained(dtype=torch.bfloat16), tmp_path / "export", tokenizer=None)
    model = load_trainable(tmp_path / "export", dtype=torch.bfloat16, checkpointing="full")
    assert model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), logits(load(tmp_path / "export")))
    model(TOKENS).float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_tied_weights_stay_one_tensor(exported: Path) -> None:
    for model in (load(exported), load_trainable(exported), freeze(trained())):
        assert model.unembedding.weight is model.embedding.weight


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
    before, unchanged = export_module.read_manifest(exported), 0
    for bit in range(0, 8 * len(whole), 11):  # 11 is coprime to 8: every kind of bit, in every place
        place, mask = bit // 8, 1 << bit % 8
        file.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            assert export_module.read_manifest(exported) == before
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
    assert export_module.load_tokenizer(tmp_path / "export").end == end


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


# Written whole or not at all

FULL = """
import sys
from pathlib import Path
from isoforward.base.config import ModelConfig
from isoforward.base.errors import StorageFailed
from isoforward.model.gpt import GPT
from isoforward.formats.export import export, fingerprint, load
place = Path(sys.argv[1])
small, large = (GPT(ModelConfig(layers=1, width=width, vocab=97, context=32)) for width in (16, 256))
export(small, place / "export", tokenizer=None)
try:
    export(large, place / "export", tokenizer=None)
except StorageFailed as error:
    print(error)
    assert fingerprint(load(place / "export")) == fingerprint(small)
    assert [path.name for path in place.iterdir()] == ["export"]
    sys.exit(error.exit_code)
"""


def test_beyond_a_limit_on_files_the_earlier_export_stays(tmp_path: Path) -> None:
    export(trained(), tmp_path / "export", tokenizer=None)
    large = GPT(replace(TINY, width=256))

    def exceed() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        export(large, tmp_path / "export", tokenizer=None)

    assert in_child(exceed) == 5
    assert torch.equal(logits(load(tmp_path / "export")), logits(trained()))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def can_mount(place: Path) -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(place)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_on_a_full_disk_the_earlier_export_stays(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("no filesystem can be mounted here")
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"', "sh"]
    command = [*mount, sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "No space left" in done.stdout, done.stderr


def test_killed_at_any_step_an_export_leaves_the_earlier_or_the_later_one(tmp_path: Path) -> None:
    place = tmp_path / "export"
    first, second = (fingerprint(freeze(trained(seed=seed))) for seed in (1, 2))
    for fatal in range(100):
        export(trained(seed=1), place, tokenizer=None)

        def replace_it(fatal: int = fatal) -> None:
            die_at_step(fatal)
            export(trained(seed=2), place, tokenizer=None)

        ended = in_child(replace_it)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        found = [path for path in (place, tmp_path / ".export.former") if path.exists()]
        assert fingerprint(load(found[0])) in (first, second)
    assert ended == 0 and fatal > 8
    assert fingerprint(load(place)) == second
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def die_at_step(fatal: int) -> None:
    """SIGKILL just before the step of that number that makes something lasting."""
    steps = iter(range(1000))

    def mortal(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(steps) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return wrapped

    os.fsync = mortal(os.fsync)
    Path.replace = mortal(Path.replace)  # type: ignore[method-assign]
    Path.write_text = mortal(Path.write_text)  # type: ignore[method-assign]
    setattr(export_module, "save_file", mortal(save_file))  # noqa: B010  # mypy knows no imported name of a module


def test_where_the_last_rename_fails_the_earlier_export_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = export(trained(), tmp_path / "export", tokenizer=None)
    rename = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".export.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageFailed, match="Input/output error"):
        export(trained(seed=2), place, tokenizer=None)
    assert torch.equal(logits(load(place)), logits(trained()))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_killed_between_its_renames_is_found_by_the_next(tmp_path: Path) -> None:
    model = trained(replace(TINY, layers=1))
    kept = export(model, tmp_path / "export", tokenizer=None)
    kept.rename(tmp_path / ".export.former")
    with pytest.raises(KeyboardInterrupt), export_module.replacing(kept):
        raise KeyboardInterrupt
    assert fingerprint(load_trainable(kept)) == fingerprint(model)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_directory_that_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    for place in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.tex"):
        with pytest.raises(BadInput, match="is no export"):
            export(trained(), place, tokenizer=None)
    with pytest.raises(StorageFailed):
        export(trained(), tmp_path / "thesis" / "chapter1.tex" / "export", tokenizer=None)
    assert (tmp_path / "thesis" / "chapter1.tex").is_file()


# Shards, and the command


def test_the_command_imports_and_says_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(trained(), tmp_path / "from", tokenizer=Tokenizer.from_characters(["abc"]))
    (tmp_path / "from" / "manifest.json").unlink()
    assert export_module.main(["import", str(tmp_path / "from"), str(tmp_path / "to")]) == 0
    assert torch.equal(logits(load(tmp_path / "to")), logits(trained()))
    assert export_module.main(["import", str(tmp_path / "nowhere"), str(tmp_path / "to")]) == 2
    (tmp_path / "to" / "model.safetensors").write_bytes(b"")
    assert export_module.main(["import", str(tmp_path / "to"), str(tmp_path / "again")]) == 3
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_written(
    number: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained()
    with torch.no_grad():
        model.get_parameter("blocks.1.attention.qkv.weight")[3, 5] = number
    export(model, tmp_path / "from", tokenizer=Tokenizer.from_characters(["abc"]))
    assert export_module.main(["import", str(tmp_path / "from"), str(tmp_path / "to")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors: the tensor transformer.h.1.attn.c_attn.weight is not finite" in said
    assert not (tmp_path / "to").exists()


def test_numbers_whose_sum_overflows_are_finite() -> None:
    assert export_module.is_finite(torch.full((9,), 3e38))


# GGUF
