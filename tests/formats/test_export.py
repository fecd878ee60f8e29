import errno
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
from safetensors.torch import save_file

from isoforward.base.errors import BadInput, StorageFailed
from isoforward.formats import export as export_module
from isoforward.formats import loading
from isoforward.formats.export import export, fingerprint, freeze
from isoforward.formats.loading import load, load_trainable
from isoforward.model.gpt import GPT
from tests.formats.exports import TINY, TOKENS, in_child, logits, trained

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
    manifest = loading.read_manifest(tmp_path / "export")
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


# Written whole or not at all

FULL = """
import sys
from pathlib import Path
from isoforward.base.config import ModelConfig
from isoforward.base.errors import StorageFailed
from isoforward.model.gpt import GPT
from isoforward.formats.export import export, fingerprint
from isoforward.formats.loading import load
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
