"""ARCHITECTURE.md names files that exist, and what it says can be counted is so."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from isoforward.app.scripts import questions
from isoforward.base.vocabulary import CONDITIONS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "isoforward").rglob("*.py"))
PACKAGE = ROOT / "src" / "isoforward" / "__init__.py"
TEXT = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "SECURITY.md")
WALKS = {
    title: re.findall(r"^\d+\. `([^`]+)`", body, re.M)
    for title, body in re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", TEXT, re.M | re.S)
}

# What may only fall: lower a limit whenever the count does.
FILES_THAT_NAME_A_QUESTION = 3
FILES_THAT_NAME_CUDA = 9
LINES_THAT_SAY_ANY = 79  # comments and imports among them


def functions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("title", WALKS)
def test_every_stop_of_a_walk_exists(title: str) -> None:
    assert WALKS[title]
    for stop in WALKS[title]:
        path, _, function = stop.partition(":")
        assert (ROOT / path).is_file(), stop
        assert not function or function in functions(ROOT / path), stop


def test_there_are_five_walks_and_the_first_two_are_short() -> None:
    assert len(WALKS) == 5
    to_backward, to_report = list(WALKS.values())[:2]
    assert len(to_backward) <= 6
    assert len({stop.partition(":")[0] for stop in to_report}) <= 6
    assert "loss.backward()" in next(iter(WALKS))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_ours_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    named = re.findall(r"`((?:src|tests|conf|docs|experiments)/[\w./]+\.\w+)(?::\w+)?`", text)
    links = re.findall(r"\]\((?!http)([\w./]+)\)", text)
    assert [path for path in named + links if not (ROOT / path).exists() and "NAME" not in path] == []


def test_the_contract_shown_is_that_of_pyproject() -> None:
    shown = re.search(r"<!-- layers -->\n```toml\n(.*?)```\n<!-- end of layers -->", TEXT, re.S)
    assert shown is not None
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert tomllib.loads(shown[1])["layers"] == layers


def test_every_room_is_a_folder_with_a_line_of_its_own() -> None:
    rooms = {path.parent.name for path in SOURCES if path.parent.parent.name == "isoforward"}
    picture = TEXT.partition("## The rooms")[2].partition("A room imports")[0]
    assert {room for room in rooms if re.search(rf"^  (.*  \|  )?{room}  ", picture, re.M)} == rooms


def strings(path: Path) -> Iterator[str]:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_the_source_names_few_questions() -> None:
    names = {question.name for question in questions() if "_" in question.name}  # others are words of everyday
    names -= CONDITIONS.keys()
    sources = [path for path in SOURCES if path != PACKAGE]  # whose public names are what they are
    naming = [path for path in sources if names & set(strings(path))]
    assert len(naming) <= FILES_THAT_NAME_A_QUESTION, naming


def test_the_source_asks_seldom_for_cuda() -> None:
    naming = [path for path in SOURCES if re.search(r"cuda", path.read_text("utf-8"))]
    assert len(naming) <= FILES_THAT_NAME_CUDA, naming


def test_few_lines_of_the_source_leave_a_type_open() -> None:
    lines = [line for path in SOURCES for line in path.read_text("utf-8").splitlines() if re.search(r"\bAny\b", line)]
    assert len(lines) <= LINES_THAT_SAY_ANY


def test_every_module_has_its_test_file() -> None:
    own = {f"{path.parent.name}/{path.stem}" for path in SOURCES if not path.stem.startswith("__")}
    tested = {f"{path.parent.name}/{path.stem.removeprefix('test_')}" for path in (ROOT / "tests").glob("*/test_*.py")}
    assert own - tested == set()
