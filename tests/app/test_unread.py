"""Every key of every command is read by code that the command can reach, or refused.

mypy, which knows of every expression what it is an attribute of, gives the graph: from a function to the functions,
classes and fields that it names. Checks of a config on itself do not count as reading it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from mypy import build as mypy_build
from mypy import nodes
from mypy import types as mypy_types
from mypy.modulefinder import BuildSource
from mypy.options import Options
from omegaconf import DictConfig

from isoforward.app.command_line import register, run
from isoforward.app.keys import GROUPS
from isoforward.app.overrides import as_text
from isoforward.app.scripts import SCRIPTS, conf_directory, scripts
from isoforward.app.unread import refuse_what_is_not_read, unread
from isoforward.base.architecture import Architecture
from isoforward.base.config import DataConfig, ExperimentConfig, GenerateConfig, TrainConfig
from isoforward.base.dependent_keys import RULES, within
from isoforward.base.errors import BadInput

ROOT = Path(__file__).parents[2]
CONFIGS = "isoforward.base.config."
# Read by getattr, or of a config that is typed as Any: `claim`, `kernels_as_asked`, `ModelConfig.architecture`
BY_NAME = {"run_dir", "kernels", *(f"model.{field.name}" for field in fields(Architecture))}
BY_NAME_OF = {
    "lifetime": "prompt new_tokens decode_batch training_mfu prefill_mfu decode_mbu busy price_per_hour "
    "training_price_per_hour",  # assumed()
    "rl_step": "prompts group prompt new_tokens epochs",  # RlStep.shape
}
AWAY = {"node", "info", "analyzed", "original_def", "definition", "type", "ref", "def_", "impl"}  # out of the tree
TEXT_KEYS = [f"data.{field.name}" for field in fields(DataConfig) if field.name not in ("batch", "length", "source")]
WITHIN = (nodes.Expression, nodes.Statement, nodes.Argument, nodes.FuncDef)
NOTHING = DictConfig({})  # no key that another one could depend on


def named_in(tree: object, seen: set[int]) -> Iterator[nodes.NameExpr | nodes.MemberExpr]:
    """mypy's own visitors are compiled, and cannot be subclassed."""
    if isinstance(tree, list | tuple):
        for each in tree:
            yield from named_in(each, seen)
    elif isinstance(tree, WITHIN) and id(tree) not in seen:
        seen.add(id(tree))
        if isinstance(tree, nodes.NameExpr | nodes.MemberExpr):
            yield tree
        for name in dir(type(tree)):
            slot = type(getattr(type(tree), name)).__name__ == "getset_descriptor"
            if slot and name not in AWAY:
                yield from named_in(getattr(tree, name, None), seen)


def instances(kind: mypy_types.Type | None) -> Iterator[mypy_types.Instance]:
    proper = mypy_types.get_proper_type(kind)
    if isinstance(proper, mypy_types.UnionType):
        for item in proper.items:
            yield from instances(item)
    elif isinstance(proper, mypy_types.TypeVarType):
        yield from instances(proper.upper_bound)
    elif isinstance(proper, mypy_types.TypeType):
        yield from instances(proper.item)
    elif isinstance(proper, mypy_types.FunctionLike) and proper.is_type_obj():
        yield from instances(proper.items[0].ret_type)
    elif isinstance(proper, mypy_types.Instance):
        yield proper


def spans(owner: str, definitions: list[Any], graph: dict[str, set[str]]) -> Iterator[tuple[int, int, str]]:
    """First line, last line and name of all that a module or a class defines, outer before inner."""
    for each in definitions:
        inner = each.func if isinstance(each, nodes.Decorator) else each
        last = inner.end_line or each.line
        if isinstance(inner, nodes.OverloadedFuncDef):
            yield from spans(owner, inner.items, graph)
        elif isinstance(inner, nodes.FuncDef):
            yield each.line, last, f"{owner}.{inner.name}"
        elif isinstance(inner, nodes.AssignmentStmt):
            yield from ((each.line, last, f"{owner}.{n.name}") for n in inner.lvalues if isinstance(n, nodes.NameExpr))
        elif isinstance(inner, nodes.ClassDef):
            name = f"{owner}.{inner.name}"
            yield each.line, last, name
            methods = list(spans(name, inner.defs.body, graph))
            yield from methods
            outside = inner.info.fallback_to_any  # a library calls its methods: Lightning, torch
            called = {m for _, _, m in methods if outside or m.startswith(f"{name}.__")}
            graph.setdefault(name, set()).update(m for m in called if not m.startswith(CONFIGS))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    options = Options()
    options.export_types = options.preserve_asts = options.explicit_package_bases = True
    options.check_untyped_defs = options.ignore_errors = True
    options.incremental = False
    options.follow_imports = "skip"  # what libraries hold reads no config
    source = ROOT / "src"
    paths = [(path, ROOT) for path in scripts().values()] + [(path, source) for path in source.rglob("*.py")]
    modules = {".".join(p.relative_to(top).with_suffix("").parts).removesuffix(".__init__"): p for p, top in paths}
    built = mypy_build.build([BuildSource(str(path), name) for name, path in modules.items()], options)
    found: dict[str, set[str]] = {}
    for module in modules:
        tree = built.graph[module].tree
        assert tree is not None
        owner_of: dict[int, str] = {}
        for first, last, name in spans(module, tree.defs, found):
            owner_of |= dict.fromkeys(range(first, last + 1), name)
        for each in named_in(tree.defs, set()):
            names = found.setdefault(owner_of.get(each.line, module), set())
            if "." in each.fullname:  # a local variable is named by itself alone, as a module may be
                names.add(each.fullname)
            if isinstance(each, nodes.MemberExpr):
                kinds = [base for one in instances(built.types.get(each.expr)) for base in one.type.mro]
                names.update(f"{base.fullname}.{each.name}" for base in kinds if each.name in base.names)
    return found


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        if (name := ahead.pop()) not in seen:
            seen.add(name)
            ahead += graph.get(name, ())
    return seen


def leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each key as it is typed, and the field that it fills."""
    for field in fields(schema):
        if field.name in GROUPS:
            yield from leaves(GROUPS[field.name], f"{field.name}.")
        else:
            owner = next(
                kind for kind in reversed(schema.__mro__) if field.name in vars(kind).get("__annotations__", {})
            )
            yield prefix + field.name, f"{owner.__module__}.{owner.__qualname__}.{field.name}"


@pytest.mark.parametrize("command", scripts())
def test_every_key_is_read_or_refused(command: str, graph: dict[str, set[str]]) -> None:
    module = command if command in SCRIPTS else f"experiments.{command}"
    schema = get_type_hints(importlib.import_module(module).main)["config"]
    read = reached(graph, f"{module}.main")
    by_name = BY_NAME | set(BY_NAME_OF.get(command, "").split())
    keys, silent = dict(leaves(schema)), unread(scripts()[command], schema)
    for key, field in keys.items():
        if field not in read and key not in by_name:
            with pytest.raises(BadInput, match=f"{key}=1: {command} (does not read|reads no text)"):
                refuse_what_is_not_read(scripts()[command], schema, NOTHING, [f"{key}=1"])
    assert silent <= set(keys)
    of_recipes = "optim." if command == "speedrun" else "-"  # it reads that of each recipe, not its own
    wrong = [key for key in silent if keys[key] in read and not key.startswith(of_recipes)]
    assert wrong == [], "refused, but read"


def test_the_refusal_names_command_and_key_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    ran = lambda config: pytest.fail("it ran")  # noqa: E731
    assert run(ran, ExperimentConfig, ["measure.repeats=5"], script=scripts()["memory"]) == 2
    assert capsys.readouterr().err == (
        "error: measure.repeats=5: memory does not read measure.repeats, so it would change nothing; "
        "leave this key out\n"
    )


@pytest.mark.parametrize(
    ("command", "override"),
    [("layers", "measure=none"), ("mismatch", "optim=muon"), ("mismatch", "+optim=adamw")],
)
def test_an_option_of_a_group_that_sets_only_what_is_not_read_is_refused(command: str, override: str) -> None:
    group = override.lstrip("+").partition("=")[0]
    with pytest.raises(BadInput, match=f"{group}=.*: {command} does not read {group}, so it would change nothing"):
        refuse_what_is_not_read(scripts()[command], ExperimentConfig, NOTHING, [override])


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("layers", "optim=muon"),
        ("mismatch", "measure=quick"),
        ("mismatch", "optim=nothing"),
        ("mismatch", "model=gpt2"),
    ],
)
def test_an_option_of_which_one_key_is_read_passes(command: str, override: str) -> None:
    refuse_what_is_not_read(scripts()[command], ExperimentConfig, NOTHING, [override])


@pytest.mark.parametrize("override", ["data=shakespeare", "data.source=hub", *(f"{key}=1" for key in TEXT_KEYS)])
def test_a_key_of_text_is_refused_where_no_text_is_read(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(BadInput, match=f"{key}=.*kv_cache reads no text"):
        refuse_what_is_not_read(scripts()["kv_cache"], ExperimentConfig, NOTHING, ["data.batch=2", override])
    if key != "data.workers":
        refuse_what_is_not_read(scripts()["precision"], ExperimentConfig, NOTHING, [override])
    refuse_what_is_not_read(scripts()["train"], TrainConfig, NOTHING, [override])


def test_keys_that_are_read_and_random_tokens_pass() -> None:
    read = ["data.batch=2", "data.length=8", "data=synthetic", "model=tiny", "measure.prompt=8"]
    refuse_what_is_not_read(scripts()["kv_cache"], ExperimentConfig, NOTHING, read)


def refusal(capsys: pytest.CaptureFixture[str], command: str, *overrides: str) -> str | None:
    """What the command says to these keys; None where it runs."""
    ran: list[object] = []
    code = run(ran.append, schema_of(command), list(overrides), script=scripts()[command])
    assert (code, bool(ran)) in ((0, True), (2, False))
    return capsys.readouterr().err.removeprefix("error: ").strip() if code else None


@pytest.mark.parametrize(
    ("command", "overrides", "said"),
    [
        ("train", "data.path=a.txt", "data.path is read with data=text alone; write data=text data.path=..."),
        ("train", "data=synthetic data.name=x", "data.name is read with data=hub alone; write data=hub data.name=..."),
        (
            "train",
            "model.path=x",
            "model.path is read with model=hf or model=transformers alone; write model=hf model.path=...",
        ),
        (
            "train",
            "model=hf model.path=x model.width=999",  # which model.heads would not divide
            "model.width is not read with model=hf: the checkpoint decides; leave one of them out",
        ),
        (
            "train",
            "model=hf model.path=x data.tokenizer=char",
            "data.tokenizer is not read with model=hf: the checkpoint decides; leave one of them out",
        ),
        (
            "train",
            "recipe=usual optim.muon_lr=1",
            "optim.muon_lr is read with optim=muon alone; write optim=muon optim.muon_lr=...",
        ),
        ("train", "optim=sgd optim.beta1=.5", "optim.beta1 is not read with optim=sgd; leave one of them out"),
        (
            "train",
            "recipe=usual +model.rope_scaling.factor=2",
            "model.rope_scaling.factor is read with model.positions=rope alone; "
            "write model.positions=rope model.rope_scaling.factor=...",
        ),
        (
            "train",
            "measure=none measure.budget=10",
            "measure.budget is not read with measure=none; leave one of them out",
        ),
        (
            "train",
            "measure=quick measure.enabled=false",
            "measure=quick is not read with measure=none; leave one of them out",
        ),
        (
            "train",
            "data.tokenizer=char data.vocab=300",
            "data.vocab is read with data.tokenizer=bpe alone; write data.tokenizer=bpe data.vocab=...",
        ),
        ("plan", "adapter.rank=4", "adapter.rank is read with adapter=lora alone; write adapter=lora adapter.rank=..."),
        (
            "phase_costs",
            "checkpoint=runs/x model=small",
            "model=small is not read with checkpoint=...: the checkpoint decides; leave one of them out",
        ),
        (
            "kv_cache",
            "data.path=x",
            'data.path="x": kv_cache reads no text, it measures on random tokens; leave this key out',
        ),
        (
            "phase_costs",
            "tracking=none tracking.project=x",
            "tracking.project is not read with tracking=none; leave one of them out",
        ),
        ("generate", "draft_tokens=9", "draft_tokens is read with draft=... alone; write draft=... draft_tokens=..."),
        (
            "generate",
            "prompts_file=f explain=true",
            "explain is not read with prompts_file=...; leave one of them out",
        ),
    ],
)
def test_a_key_that_another_one_rules_out_is_refused(
    command: str, overrides: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, command, *overrides.split()) == said


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("train", "data=text data.path=x data.column=y"),
        ("train", "recipe=usual optim=muon optim.muon_lr=1"),
        ("train", "recipe=fast optim.muon_lr=1"),  # which chooses it
        ("train", "optim.muon_lr=1"),  # as the usual recipe does
        ("train", "recipe=finetune model=hf model.path=x"),  # whose model and vocabulary are not typed
        ("train", "recipe=baby model=hf model.path=x"),
        ("train", "model=tiny model.positions=rope model.rope_theta=7"),
        ("train", "data=text data.path=x data.vocab=300 trainer.resume=runs/x"),
        ("plan", "adapter=lora adapter.rank=4"),
        ("phase_costs", "checkpoint=runs/x optim=sgd optim.momentum=0"),
        ("generate", "draft=x draft_tokens=9"),
    ],
)
def test_it_is_taken_beside_the_right_one(command: str, overrides: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, command, *overrides.split()) is None


def test_cases_of_a_sweep_are_refused_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[Any] = []
    assert run(ran.append, GenerateConfig, ["-m", "draft=null,x", "draft_tokens=2"], script=scripts()["generate"]) == 2
    assert [config.draft for config in ran] == ["x"]
    assert capsys.readouterr().err.startswith("error: draft_tokens is read with draft=... alone")


def schema_of(command: str) -> type:
    module = command if command in SCRIPTS else f"experiments.{command}"
    return get_type_hints(importlib.import_module(module).main)["config"]


def documented() -> list[tuple[str, tuple[str, ...]]]:
    """Every command line of the documents, and of the scripts' own docstrings, with its keys."""
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "experiments").glob("*.md"),
        *scripts().values(),
    ]
    names = "|".join(scripts())
    line = re.compile(
        rf"(?:python (?:experiments/)?({names})\.py|isoforward ({names}))((?:\s+(?:-m\b|'?[+~]?[\w./]+=[^\s`，]*))+)"
    )
    found = {
        (match[1] or match[2], tuple(match[3].split()))
        for page in pages
        for match in line.finditer(page.read_text(encoding="utf-8").replace("\\\n", " "))
    }
    return sorted(found)


DEPENDENT = dict.fromkeys(key for rule in RULES for key in rule.keys.split())


@pytest.mark.parametrize(("command", "keys"), documented())
def test_no_command_that_is_documented_is_refused(command: str, keys: tuple[str, ...]) -> None:
    schema = schema_of(command)
    typed = [as_text(key.strip("'"), schema) for key in keys if not key.startswith(("-m", "hydra", "recipe=NAME"))]
    first = [re.sub(r"=([^\[{]*?),.*", r"=\1", key) if "-m" in keys else key for key in typed]  # of a sweep
    config = NOTHING
    if any(within(key.partition("=")[0], DEPENDENT) for key in first):  # composing takes its time
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = compose(register(scripts()[command], schema), overrides=first)
    refuse_what_is_not_read(scripts()[command], schema, config, first)
