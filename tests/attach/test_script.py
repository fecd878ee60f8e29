"""`isoforward attach script.py`: scripts run as they are, and what they raise, print and return stays theirs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isoforward import read
from isoforward.attach import script
from tests.loaded import loaded_python

LOOP = """
import os
import signal
import sys
import torch
from torch.nn.utils import clip_grad_norm_
from model import Model  # beside the script

def main(steps):
    torch.manual_seed(0)
    model = Model()
    data = torch.utils.data.TensorDataset(torch.randn(400, 8), torch.randint(3, (400,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (x, y) in enumerate(loader):
        if step == steps:
            break
        if step == 20 and "fail" in sys.argv:
            raise ZeroDivisionError("theirs")
        if step == 20 and "interrupt" in sys.argv:
            os.kill(os.getpid(), signal.SIGINT)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if "idle" in sys.argv:
            continue
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"{sum(weight.double().sum().item() for weight in model.parameters()):.17g}", sys.argv[1:])
    if "exit" in sys.argv:
        sys.exit(3)

if __name__ == "__main__":
    main(int(sys.argv[1]))
"""
MODEL = """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
    def forward(self, x):
        return self.layers(x)
"""


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train_script.py").write_text(LOOP)
    (tmp_path / "own" / "model.py").write_text(MODEL)
    return tmp_path


def typed(where: Path, *arguments: str, python: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python or loaded_python(), *arguments], cwd=where, env=environment, capture_output=True, text=True
    )


def test_a_script_runs_as_it_does_alone_and_its_steps_are_accounted_for(where: Path) -> None:
    alone = typed(where, "own/train_script.py", "40")
    attached = typed(where, "-m", "isoforward", "attach", "own/train_script.py", "40")
    assert attached.returncode == 0, attached.stderr
    assert attached.stdout == alone.stdout  # the weights it prints, to the last digit
    assert "its forward in inference" in " ".join(attached.stderr.split())
    (run,) = (where / "runs").iterdir()
    rows = read(run / "results.jsonl").rows
    phases = {row.phase for row in rows if row.quantity == "time" and row.life == "training"}
    assert {"data", "forward", "loss", "backward", "clipping", "optimizer", "step", "residual"} <= phases
    assert {row.conditions["model"] for row in rows} == {"Model"}
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("how", ["fail", "interrupt"])
def test_what_ends_a_script_is_theirs_and_our_rows_end_cleanly(how: str, where: Path) -> None:
    alone = typed(where, "own/train_script.py", "40", how, python=sys.executable)  # whose traceback is plain
    failed = typed(where, "-m", "isoforward", "attach", "own/train_script.py", "40", how)
    assert failed.returncode == alone.returncode == (1 if how == "fail" else -signal.SIGINT)
    assert "Traceback" in alone.stderr and failed.stderr.endswith(alone.stderr)  # to the last line of it
    (run,) = (where / "runs").iterdir()
    found = read(run / "results.jsonl")
    assert {row.life for row in found.rows} == {"training"}
    assert found.verdicts[0].figures["steps"] == 20
    assert (run / "report.html").is_file()


def test_a_script_that_never_calls_backward_gets_a_reason_in_place_of_rows(where: Path) -> None:
    attached = typed(where, "-m", "isoforward", "attach", "own/train_script.py", "40", "idle")
    assert attached.returncode == 0, attached.stderr
    assert attached.stdout == typed(where, "own/train_script.py", "40", "idle").stdout
    assert "No training step was timed: nothing was trained" in attached.stderr
    assert not (where / "runs").exists()


def test_a_script_with_an_error_of_syntax_is_told_as_python_tells_it(where: Path) -> None:
    (where / "wrong.py").write_text("def f(:\n")
    alone = typed(where, "wrong.py", python=sys.executable)
    attached = typed(where, "-m", "isoforward", "attach", "wrong.py")
    assert attached.returncode == alone.returncode == 1
    assert attached.stderr.endswith(alone.stderr)


def test_rows_that_cannot_be_written_are_no_error_of_the_training(where: Path) -> None:
    (where / "runs").write_text("in the way")
    attached = typed(where, "-m", "isoforward", "attach", "own/train_script.py", "40")
    assert attached.returncode == 0 and "Traceback" not in attached.stderr
    assert "A training step takes" in attached.stderr
    assert "error: " in attached.stderr and "could not be written" in attached.stderr


def test_a_scripts_exit_code_is_that_of_the_command(where: Path) -> None:
    assert typed(where, "-m", "isoforward", "attach", "own/train_script.py", "5", "exit").returncode == 3


def test_what_is_no_script_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["nowhere.py"]) == 2
    assert "nowhere.py is not a file" in capsys.readouterr().err
    assert script.main(["--help"]) == 0
    assert "isoforward attach SCRIPT" in capsys.readouterr().out
