"""The commands import and gguf: what they write, and what they say where they cannot."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isoforward.app.convert import main
from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export
from isoforward.formats.gguf_writing import write_gguf
from isoforward.formats.loading import load
from isoforward.model.gpt import GPT
from isoforward.serve.inference import load as serve
from tests.formats.exports import logits, trained
from tests.formats.test_gguf_format import SMALL_LLAMA


def test_import_writes_an_export_and_says_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(trained(), tmp_path / "from", tokenizer=Tokenizer.from_characters(["abc"]))
    (tmp_path / "from" / "manifest.json").unlink()
    assert main(["import", str(tmp_path / "from"), str(tmp_path / "to")]) == 0
    assert torch.equal(logits(load(tmp_path / "to")), logits(trained()))
    assert main(["import", str(tmp_path / "nowhere"), str(tmp_path / "again")]) == 2
    (tmp_path / "to" / "model.safetensors").write_bytes(b"")
    assert main(["import", str(tmp_path / "to"), str(tmp_path / "again")]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_a_run_is_its_export_and_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "model.gguf"
    export(trained(), run / "export", tokenizer=Tokenizer.from_characters(["abc"]))
    assert main(["gguf", str(run), str(out)]) == 0
    written = out.read_bytes()
    for command in ("gguf", "import"):
        assert main([command, str(run), str(out)]) == 2
        assert f"{out} is there already; choose another place" in capsys.readouterr().err
    assert out.read_bytes() == written


def test_help_says_what_both_places_are(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("gguf", "import"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "to write; it must not be there yet" in shown and "GGUF file" in shown


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_written(
    number: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained()
    with torch.no_grad():
        model.get_parameter("blocks.1.attention.qkv.weight")[3, 5] = number
    export(model, tmp_path / "from", tokenizer=Tokenizer.from_characters(["abc"]))
    assert main(["import", str(tmp_path / "from"), str(tmp_path / "to")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors: the tensor transformer.h.1.attn.c_attn.weight is not finite" in said
    assert not (tmp_path / "to").exists()


def an_export(place: Path, tokenizer: Tokenizer) -> Path:
    return export(GPT(replace(SMALL_LLAMA, vocab=tokenizer.vocabulary)), place, tokenizer=tokenizer)


def test_gguf_writes_an_export_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    place = an_export(tmp_path / "export", Tokenizer.train_bpe(["the king and the queen. " * 20], 270))
    assert main(["gguf", str(place), str(tmp_path / "model.gguf")]) == 0
    assert "parameters in torch.float32\n" in capsys.readouterr().out
    assert serve(tmp_path / "model.gguf").encode("the king") == serve(place).encode("the king")


def test_a_tokenizer_that_llama_cpp_lacks_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    characters = Tokenizer.from_characters(["the king"])
    place = an_export(tmp_path / "export", characters)
    assert main(["gguf", str(place), str(tmp_path / "model.gguf")]) == 0
    assert "without its tokenizer, which llama.cpp does not have: it does not cut" in capsys.readouterr().out
    tokens = torch.tensor([characters.encode("the king")])
    assert torch.equal(load(tmp_path / "model.gguf")(tokens), load(place)(tokens))
    with pytest.raises(BadInput, match="cannot read text with this tokenizer: it does not cut"):
        write_gguf(load(place), tmp_path / "another.gguf", characters)
    assert not (tmp_path / "another.gguf").exists()


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = an_export(tmp_path / "export", Tokenizer.train_bpe(["the king and the queen. " * 20], 270))
    (tmp_path / "file").touch()
    assert main(["gguf", str(place), str(tmp_path / "file" / "model.gguf")]) != 0
    assert "could not be written" in capsys.readouterr().err
    assert main(["gguf", str(tmp_path / "nowhere"), str(tmp_path / "model.gguf")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"export", "file"}
