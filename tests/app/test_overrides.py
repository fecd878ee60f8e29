"""What is typed arrives as it was typed, in single runs and in sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from isoforward.app.command_line import run, writable
from isoforward.app.overrides import as_text, text_keys
from isoforward.app.scripts import scripts
from isoforward.base.config import ExperimentConfig, GenerateConfig, TrainConfig
from isoforward.base.errors import BadInput

PARSER = OverridesParser.create()
CHARACTERS = st.sampled_from([*"ab1 ,={}[]()'\"\\$~:;%#&!?*@+-/.\n\té日👩", "${", "null", "choice("])
TEXTS = [
    '"Yes," she said, "no."',
    '"To be."',
    "'tis",
    "it's",
    "a\\",
    'a\\"b',
    "tail\\\\",
    "O, for a muse of fire: {x} [y] = $z",
    "${seed}",
    "\\${seed}",
    "line one\nline two\n",
    "key=value, other=value",
    "~",
    "1e3",
    "true",
    "007",
    "日本語 שלום",
    " spaces ",
    "",
    ",",
]


def arrives(argument: str, schema: type) -> list[Any]:
    """The values of the key in each case that Hydra makes of it, as the config then holds them."""
    override = PARSER.parse_override(argument)
    if override.is_sweep_override():
        cases = [f"{override.key_or_group}={case}" for case in override.sweep_string_iterator()]
        return [value for case in cases for value in arrives(case, schema)]
    node = writable(schema)
    OmegaConf.update(node, override.key_or_group, override.value())
    return [OmegaConf.select(node, override.key_or_group)]


@given(st.lists(CHARACTERS).map("".join).filter(lambda text: text.strip("'\"") not in ("null", "???")))
@example('"Yes," she said, "no."')
@example("\\\\${x}\\")
@example("\\\n")
@settings(deadline=None)
def test_any_text_arrives_as_it_was_typed(text: str) -> None:
    assert arrives(as_text(f"prompt={text}", GenerateConfig), GenerateConfig) == [text]


def test_what_hydra_takes_for_missing_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"prompt=\?\?\? means a missing value"):
        as_text("prompt=???", GenerateConfig)


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_reaches_its_command_as_it_was_typed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a sweep leaves its directory
    seen: list[str | None] = []
    for arguments in ([f"prompt={text}"], [f"prompt={text}", "-m"]):
        main = lambda config: seen.append(config.prompt)  # noqa: E731
        assert run(main, GenerateConfig, arguments, script=scripts()["generate"]) == 0
    assert seen == [text, text]


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("prompt=ROMEO:,JULIET:", ["ROMEO:", "JULIET:"]),
        ("prompt='a,b','c,d'", ["a,b", "c,d"]),
        ('prompt="To be, or",not', ['"To be, or"', "not"]),
        ("prompt=O, Romeo,don't,won't", ["O, Romeo", "don't", "won't"]),
        ("prompt=choice(a,b)", ["a", "b"]),
        ("prompt=(a,b),{c,d}", ["(a,b)", "{c,d}"]),
        ("prompt=null,1", [None, "1"]),
        ("precision=fp32, bf16", ["fp32", "bf16"]),
        ("checkpoint=runs/a b,runs/c=d", ["runs/a b", "runs/c=d"]),
        ("checkpoint='runs/a,b'", ["runs/a,b"]),
    ],
)
def test_commas_of_a_sweep_separate_values(typed: str, values: list[str]) -> None:
    assert arrives(as_text(typed, GenerateConfig, sweep=True), GenerateConfig) == values


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("data.path=books/{a,b}, c=*.txt", "books/{a,b}, c=*.txt"),
        ("data.name=me/my [data], (v2)", "me/my [data], (v2)"),
        ("data.column=what, if", "what, if"),
        ("tracking.project=a=b", "a=b"),
        ("checkpoint='as it is'", "as it is"),  # as people who know Hydra write a path
        ("checkpoint=~/runs/a", "HOME/runs/a"),
        ("data.path=~/~", "HOME/~"),
        ("data.column=~/x", "~/x"),
        ("run_dir=~/${seed}", "HOME/1234"),
        ("data.path=null", None),
    ],
)
@pytest.mark.parametrize("sweep", [False, True])
def test_every_text_key_takes_text_and_a_path_begins_at_home(
    typed: str, value: str | None, sweep: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    schema = ExperimentConfig if "checkpoint" in typed else TrainConfig
    if sweep and ", " in typed:
        key, _, text = typed.partition("=")
        typed = f'{key}="{text}"'  # its comma would separate
    (found,) = arrives(as_text(typed, schema, sweep=sweep), schema)
    assert found == (value and value.replace("HOME", str(tmp_path)))


@pytest.mark.parametrize(
    "argument", ["seed=1", "model=tiny", "-m", "--help", "model.layers=1,2", "optim.lr=choice(1,2)", "values=[a,b]"]
)
def test_what_is_no_text_stays_as_it_is(argument: str) -> None:
    for sweep in (False, True):
        assert as_text(argument, TrainConfig, sweep=sweep) == argument


def test_simple_values_of_a_sweep_have_no_quotes_that_would_show_in_the_names_of_its_cases() -> None:
    assert as_text("optim.name=adamw,sgd", TrainConfig, sweep=True) == "optim.name=adamw,sgd"


def test_text_keys_are_those_of_the_schema() -> None:
    found = set(text_keys(TrainConfig))
    assert {"data.path", "data.column", "optim.name", "sample_prompt", "run_dir"} <= found
    assert not {"seed", "model.layers", "data"} & found
