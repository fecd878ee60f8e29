"""What goes to stdout, what to stderr, and what the figures are made of."""

from pathlib import Path

import pytest
import torch

from isoforward.app.generate import figures, generate, read_prompts
from isoforward.base.config import GenerateConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import Pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_characters(["ROMEO: abc"])
    model = GPT(ModelConfig(layers=1, heads=2, width=16, context=16, vocab=tokenizer.vocabulary))
    return str(export(freeze(model), tmp_path_factory.mktemp("model") / "export", tokenizer=tokenizer))


def passed(time_s: float, tokens: int = 1, context: int = 8) -> Pass:
    of_none = torch.zeros(tokens, 4)
    return Pass(rows=[0], tokens=[0] * tokens, context=context, time_s=time_s, logits=of_none, scores=of_none)


def test_text_goes_to_stdout_and_figures_to_stderr(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate(GenerateConfig(checkpoint=checkpoint, prompt="ROMEO:", max_new_tokens=4, temperature=0))
    shown = capsys.readouterr()
    assert shown.out.startswith("ROMEO:") and len(shown.out) == len("ROMEO:") + 4 + 1
    assert "TTFT" in shown.err and "TPOT" in shown.err


def test_streamed_or_not_the_text_is_the_same(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for stream in (True, False):
        generate(GenerateConfig(checkpoint=checkpoint, prompt="ROMEO:", max_new_tokens=6, stream=stream))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_full_context_is_said(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate(GenerateConfig(checkpoint=checkpoint, prompt="ROMEO:", max_new_tokens=100, temperature=0))
    assert "the context of 16 tokens is full" in capsys.readouterr().err


def test_a_file_of_prompts_is_served_as_one_batch(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts").write_text("ROMEO:\nabc\n")
    generate(GenerateConfig(checkpoint=checkpoint, prompts_file=str(tmp_path / "prompts"), max_new_tokens=2))
    shown = capsys.readouterr()
    assert [text[:3] for text in shown.out.split("\n\n")] == ["ROM", "abc", ""]
    assert "2 prompts as one batch" in shown.err


def test_prompts_that_cannot_be_read_are_refused_by_the_name_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"na\xefve")
    for name, why in (("none", "cannot be read"), ("empty", "is empty"), ("latin", "not UTF-8 at byte 2")):
        with pytest.raises(BadInput, match=why):
            read_prompts(GenerateConfig(prompts_file=str(tmp_path / name)))


def test_the_first_pass_is_no_part_of_the_time_of_a_token() -> None:
    said = figures([passed(0.5, context=6), passed(0.01), passed(0.03)], cache=True, compiled=False)
    assert said == "TTFT 500.0 ms for 6 prompt tokens · TPOT 20.00 ms · 50 tokens/s over 2 decoded"


def test_compiling_is_no_part_of_it_either() -> None:
    said = figures([passed(0.5), passed(30.0), passed(0.01)], cache=True, compiled=True)
    assert "30.0 s to compile the step · TPOT 10.00 ms" in said


def test_a_pass_that_gave_several_tokens_is_one_forward() -> None:
    said = figures([passed(0.5), passed(0.02, tokens=3), passed(0.02)], cache=True, compiled=False)
    assert said.endswith("TPOT 10.00 ms · 100 tokens/s over 4 decoded in 2 forward passes")


def test_what_is_missing_is_said() -> None:
    assert figures([], cache=True, compiled=False) == "no token was asked for"
    assert figures([passed(0.5)], cache=False, compiled=False).endswith("without KV cache")
