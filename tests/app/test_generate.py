"""What `python generate.py` prints: text or JSON lines to stdout, everything else to stderr; and its figures."""

from __future__ import annotations

import json
import os
import subprocess
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
from tests.loaded import loaded_python
from tests.says import says

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("how", [{}, {"exact": True}, {"draft": True}, {"exact": True, "draft": True}])
def test_the_tokens_of_the_prompt_are_counted_however_it_is_served(
    how: dict[str, bool], checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = checkpoint if how.get("draft") else None
    asked = GenerateConfig(checkpoint=checkpoint, prompt="R", max_new_tokens=4, exact="exact" in how, draft=draft)
    generate(asked)
    assert "for 1 prompt token ·" in capsys.readouterr().err


def test_what_is_refused_says_nothing_of_compiling(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="exact=true cannot be had with compile=true"):
        generate(GenerateConfig(checkpoint=checkpoint, prompt="R", exact=True, compile=True))
    assert capsys.readouterr().err == ""


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
    (tmp_path / "powershell").write_bytes("ROMEO:\nabc\n".encode("utf-16"))
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfROMEO:\r\nabc\r\n")
    assert read_prompts(GenerateConfig(prompts_file=str(tmp_path / "marked"))) == ["ROMEO:", "abc"]
    for name, why in (
        ("none", "cannot be read"),
        ("empty", "is empty"),
        ("latin", r"not UTF-8 at byte 2; convert it first \(iconv -f latin1 -t utf-8"),
        ("powershell", r"prompts_file=.*powershell is UTF-16; convert it first \(iconv -f utf-16 -t utf-8\)"),
    ):
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


def test_one_is_not_several() -> None:
    said = figures([passed(0.5, context=1), passed(0.02, tokens=3)], cache=True, compiled=False)
    assert "for 1 prompt token ·" in said and said.endswith("over 3 decoded in 1 forward pass")


def test_what_is_missing_is_said() -> None:
    assert figures([], cache=True, compiled=False) == "no token was asked for"
    assert figures([passed(0.5)], cache=False, compiled=False).endswith("without KV cache")


@pytest.fixture(scope="module")
def sea(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return says(tmp_path_factory.mktemp("sea"), "▁sea", [2, 3])


def printed(capsys: pytest.CaptureFixture[str], **keys: object) -> tuple[str, str]:
    generate(GenerateConfig(temperature=0, **keys))  # type: ignore[arg-type]
    shown = capsys.readouterr()
    return shown.out, shown.err


def asked(tmp_path: Path, *prompts: str) -> str:
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return str(tmp_path / "prompts.txt")


def test_a_batch_is_spaced_as_one_prompt_is_and_its_full_rows_are_named(
    sea: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["king"] * 50)
    file = asked(tmp_path, "the king", long)
    out, err = printed(capsys, checkpoint=str(sea), prompts_file=file, max_new_tokens=30)
    first, second = out.split("\n\n")[:2]
    assert first == "the king" + " sea" * 30
    room = second.count(" sea")
    assert second == long + " sea" * room and room < 30
    assert f"prompt 2: the context of 64 tokens is full after {room} new ones" in err
    assert "prompt 1:" not in err


def test_log_probabilities_are_a_json_line_a_token(
    sea: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = printed(capsys, checkpoint=str(sea), prompt="the king", max_new_tokens=3, logprobs=True)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [list(line) for line in lines] == [["token", "text", "logprob"]] * 3
    assert "".join(line["text"] for line in lines) == " sea sea sea"
    assert all(-1e-6 < line["logprob"] <= 0 for line in lines)
    file = asked(tmp_path, "the king", "sea")
    out, _ = printed(capsys, checkpoint=str(sea), prompts_file=file, max_new_tokens=2, logprobs=True)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [1, 1, 2, 2]


def test_a_chat_shows_the_answer_alone_and_a_model_without_a_template_refuses(
    sea: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = printed(capsys, checkpoint=str(sea), prompt="the king", max_new_tokens=2, chat=True)
    assert out == " sea sea\n"
    plain = says(tmp_path / "plain", "▁sea", 2)
    (plain / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInput, match="no chat_template; leave out chat=true"):
        printed(capsys, checkpoint=str(plain), prompt="the king", chat=True)


def test_a_special_token_that_a_prompt_spells_is_text_and_that_is_said(
    sea: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = printed(capsys, checkpoint=str(sea), prompt="the<|eot|>", max_new_tokens=1)
    assert "<|eot|> in the prompt is read as text; parse_special=true" in err
    _, err = printed(capsys, checkpoint=str(sea), prompt="the<|eot|>", max_new_tokens=1, parse_special=True)
    assert "read as text" not in err and "for 3 prompt tokens" in err
    _, err = printed(capsys, checkpoint=str(sea), prompt="the", max_new_tokens=1, add_special_tokens=False)
    assert "for 1 prompt token\n" in err


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"chat": True}, "needs a message"),
        ({"chat": True, "prompt": "a", "parse_special": True}, "from the template"),
        ({"chat": True, "prompt": "a", "add_special_tokens": False}, "from the template"),
        ({"logprobs": True, "explain": "true"}, "one of them"),
    ],
)
def test_keys_that_would_do_nothing_together_are_refused(keys: dict[str, object], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        GenerateConfig(**keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "encoding",
    ["latin-1", "ascii", *(pytest.param(encoding, marks=pytest.mark.slow) for encoding in ("cp1252", "utf-8"))],
)
@pytest.mark.parametrize(
    "command",
    [
        ["generate.py", "prompt=the µ ± 日本", "max_new_tokens=2"],
        ["generate.py", "prompt=the 日本", "max_new_tokens=2", "explain=true"],
        ["generate.py", "--help"],
        ["-m", "isoforward", "--help"],
        ["-m", "isoforward", "report", "runs/日本"],
        ["train.py", "model=日本"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_what_a_terminal_cannot_show_is_replaced_on_every_command(
    sea: Path, tmp_path: Path, command: list[str], encoding: str
) -> None:
    script = [str(ROOT / part) if part.endswith(".py") else part for part in command]
    checkpoint = [f"checkpoint={sea}"] if command[0] == "generate.py" and "--help" not in command else []
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([loaded_python(), *script, *checkpoint], cwd=tmp_path, env=environment, capture_output=True)
    assert b"Traceback" not in done.stderr and b"UnicodeEncodeError" not in done.stderr
    assert done.returncode == (2 if "日本" in " ".join(command) and command[0] != "generate.py" else 0)
    if "max_new_tokens=2" in command:
        assert done.stdout.decode(encoding).rstrip().endswith("sea sea")
        assert ("日本" in done.stdout.decode(encoding)) == (encoding == "utf-8")
