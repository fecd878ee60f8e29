"""Every YAML composes; every mistake is one clear message, the code 2, and nothing written."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isoforward.app.command_line import explain, option, register, run, typed
from isoforward.app.keys import GROUPS, unknown_key
from isoforward.app.scripts import CHAPTERS, conf_directory, read_script, scripts
from isoforward.base.config import ExperimentConfig, GenerateConfig, ModelConfig, OptimConfig, TrainConfig
from isoforward.base.errors import BadInput

CONF = conf_directory()
ROOT = Path(__file__).parents[1]
NEEDS = {"hf": ["model.path=x"], "transformers": ["model.path=x"], "text": ["data.path=x"], "hub": ["data.name=x"]}


Config = TypeVar("Config")


def composed(name: str, schema: type[Config], *overrides: str) -> Config:
    config_name = register(scripts()[name], cast(type, schema))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(
            compose(config_name, overrides=["run_dir=x", *overrides] if schema is not GenerateConfig else []), schema
        )


OPTIONS = [
    (group.name, path.stem)
    for group in sorted(CONF.iterdir())
    if group.is_dir()
    for path in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, name: str) -> None:
    if group == "recipe" or name in NEEDS:
        assert composed("train", TrainConfig, f"{group}={name}", *NEEDS.get(name, []), "data.length=32")
    else:  # which Hydra merges as it does those that a recipe has
        assert option(group, name)


def test_every_group_has_a_schema() -> None:
    assert {group for group, _ in OPTIONS} == set(GROUPS) | {"recipe"}  # which fills the others


def test_a_config_outside_the_groups_is_of_a_command_and_says_nothing_that_every_command_has() -> None:
    for path in CONF.glob("*.yaml"):
        assert path.stem in scripts()
        assert "hydra" not in OmegaConf.load(path)


def test_a_question_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name, its config and its help are made from it; keys of its own are those of its schema."""
    script = tmp_path / "cost_of_nothing.py"
    script.write_text('"""What does nothing cost?\n\n    python cost_of_nothing.py ${PATH}\n\n:chapter: Trust\n"""\n')
    seen: list[ExperimentConfig] = []
    assert run(seen.append, ExperimentConfig, ["model=small", "optim.lr=1"], script=script) == 0
    assert seen[0].model.layers == 6 and seen[0].data.source == "synthetic" and seen[0].optim.lr == 1
    assert seen[0].run_dir.startswith("runs/") and seen[0].run_dir.endswith("_cost_of_nothing")
    with pytest.raises(SystemExit):
        run(seen.append, ExperimentConfig, ["--help"], script=script)
    shown = capsys.readouterr().out
    assert shown.startswith("What does nothing cost?\n\n    python cost_of_nothing.py ${PATH}\n\nGroups")


def test_generate_composes() -> None:
    assert composed("generate", GenerateConfig) == GenerateConfig()


def test_an_option_fills_what_the_schema_declares() -> None:
    config = composed("train", TrainConfig, "model=llama3_8b")
    assert config.model == ModelConfig(
        family="llama",
        layers=32,
        heads=32,
        kv_heads=8,
        width=4096,
        ffn=14336,
        context=8192,
        vocab=128256,
        tied=False,
        rope_theta=500000.0,
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=3", "optim.lrr: no such key; did you mean optim.lr?"),
        ("lr=3", "lr: no such key; did you mean optim.lr?"),
        ("+typo=1", "typo: no such key"),
        ("+model.wdith=64", "model.wdith: no such key; did you mean model.width?"),
        ("model=tinny", "model=tinny is not known: did you mean tiny?"),
        ("optim=schema", "optim=schema is not known: choose one of adam, adamw, muon, sgd"),
        ("model.layers=x", "model.layers: Value 'x' of type 'str' could not be converted to Integer"),
        ("model.layers=-1", "model.layers=-1 must be a finite number of at least 1"),
        ("model.layers=0", "model.layers=0"),
        ("model.heads=5", "model.heads=5 does not divide model.width=128"),
        ("model.family=gpt3", "model.family=gpt3 is not known: did you mean gpt2?"),
        ("optim.lr=nan", "optim.lr=nan must be a finite number"),
        ("data.length=1000", "data.length=1000 is longer than model.context=256"),
        ("data=text", "data=text needs data.path="),
        ("precision=fp8", "precision=fp8 is not known"),
        ("trainer.accumulate=3", "data.batch=4 cannot be cut into"),
        ("seed=-1", "seed=-1 must lie between"),
        ("recipe=null", "write ~group to leave it out, not group=null"),
        ("nonsense", "Error parsing override 'nonsense'"),
        ("model.layers=[1", "quote values that hold"),
    ],
)
def test_a_mistake_is_told_in_one_message_and_nothing_is_written(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(lambda config: pytest.fail("it ran"), TrainConfig, [override], script=scripts()["train"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert said in told.err
    assert "Traceback" not in told.err
    assert len(told.err.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def keys(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for field in fields(schema):
        if field.name in GROUPS:
            found += keys(GROUPS[field.name], f"{field.name}.")
        else:
            found.append((prefix + field.name, str(field.type)))
    return found


KEYS = dict(keys(TrainConfig))
NUMBERS = [key for key, kind in KEYS.items() if kind.startswith(("int", "float"))]
SWITCHES = [key for key, kind in KEYS.items() if kind.startswith("bool")]


@pytest.fixture(scope="module")
def base() -> DictConfig:
    """What Hydra applies overrides to, composed once: that is what takes long."""
    config_name = register(scripts()["train"], TrainConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_name, overrides=["run_dir=x"])


def refusal(base: DictConfig, override: str) -> str:
    """What `run` would say to it: applied as Hydra applies it."""
    parsed = OverridesParser.create().parse_override(override)
    before = OmegaConf.select(base, parsed.key_or_group)
    try:
        OmegaConf.update(base, parsed.key_or_group, parsed.value(), merge=True)
        typed(base, TrainConfig)
    except OmegaConfBaseException as error:
        return str(explain(error, TrainConfig))
    except BadInput as refused:
        return str(refused)
    finally:
        OmegaConf.update(base, parsed.key_or_group, before, merge=True)
    pytest.fail(f"{override} was taken")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_misspelt_is_refused_with_a_hint(key: Any) -> None:
    assert str(unknown_key(f"{key}x", TrainConfig)).startswith(f"{key}x: no such key; did you mean {key}? ")


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_of_another_type_or_out_of_range_is_refused_by_its_key(key: Any, base: Any) -> None:
    beyond = "1" + "0" * 400 if KEYS[key].startswith("int") else "-1e999"
    for wrong in ("text", "[1]", "{a: 1}", "-1", "nan", beyond):
        told = refusal(base, f"{key}={wrong}")
        assert key in told and len(told.splitlines()) <= 2


@pytest.mark.parametrize("key", SWITCHES)
def test_every_switch_given_as_something_else_is_refused_by_its_key(key: Any, base: Any) -> None:
    for wrong in ("text", "[1]", "{a: 1}", "2.5"):
        assert key in refusal(base, f"{key}={wrong}")


@pytest.mark.parametrize(
    "override", ["trainer.max_stepsx=1", "model.width=[1]", "data.batch=-1", "optim.lr=1" + "0" * 400]
)
def test_and_so_says_the_command(
    override: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(lambda config: pytest.fail("it ran"), TrainConfig, [override], script=scripts()["train"]) == 2
    told = capsys.readouterr().err
    if "stepsx" not in override and "000" not in override:
        assert told == f"error: {refusal(base, override)}\n"
    assert override.partition("=")[0] in told
    assert list(tmp_path.iterdir()) == []


def generate(main: Callable[[GenerateConfig], None], *overrides: str) -> int:
    return run(main, GenerateConfig, list(overrides), script=scripts()["generate"])


@pytest.mark.parametrize("path", scripts().values(), ids=scripts().keys())
def test_every_script_says_in_its_first_line_what_it_is_for_and_how_it_is_called(path: Any) -> None:
    script = read_script(path)
    assert script.about == script.help.splitlines()[0]
    assert f"python {path.relative_to(ROOT)}" in script.help
    if path.parent.name == "experiments":
        assert script.about.endswith("?")
        assert script.chapter in CHAPTERS[:-1]


@pytest.mark.parametrize(("name", "schema"), [("train", TrainConfig), ("break_even", ExperimentConfig)])
def test_help_is_shown_and_nothing_run(name: str, schema: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(lambda config: pytest.fail("it ran"), schema, ["--help"], script=scripts()[name])
    assert end.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "python " in shown
    assert "Powered by Hydra" not in shown
    assert "\noptim: adam, adamw, muon, sgd\n" in shown and "schema" not in shown
    assert ("\nrecipe: " in shown) == (name == "train")


def test_the_package_finds_its_configs_beside_it() -> None:
    assert Path(conf_directory(), "train.yaml").is_file()


def test_a_path_may_hold_what_hydra_takes_for_grammar() -> None:
    seen: list[str] = []
    assert generate(lambda config: seen.append(config.checkpoint), "checkpoint=a=b, c/d") == 0
    assert seen == ["a=b, c/d"]


def test_a_recipe_chooses_all_that_training_depends_on_and_what_is_typed_goes_before_it() -> None:
    verse, usual = composed("train", TrainConfig), composed("train", TrainConfig, "recipe=usual")
    assert (verse.model.family, verse.optim.name, verse.data.batch) == ("llama", "muon", 4)
    assert (usual.model.family, usual.optim.name, usual.data.batch) == ("gpt2", "adamw", 8)
    assert usual.optim == OptimConfig()
    assert composed("train", TrainConfig, "model=small").model == ModelConfig(layers=6, heads=6, width=384)
    assert composed("train", TrainConfig, "optim=adamw").optim == OptimConfig()
    tuned = composed("train", TrainConfig, "model=hf", "model.path=x", "recipe=finetune").optim
    assert (tuned.name, tuned.lr) == ("adamw", 1e-4)
