"""`isoforward attach script.py`: scripts run as they are, and what they raise, print and return stays theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isoforward import read
from isoforward.attach import script

LOOP = """
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
        loss = torch.nn.functional.cross_entropy(model(x), y)
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


def typed(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True)


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


def test_what_a_script_raises_is_theirs_and_our_rows_end_cleanly(where: Path) -> None:
    failed = typed(where, "-m", "isoforward", "attach", "own/train_script.py", "40", "fail")
    assert failed.returncode == 1
    assert failed.stderr.rstrip().endswith("ZeroDivisionError: theirs")
    (run,) = (where / "runs").iterdir()
    assert {row.life for row in read(run / "results.jsonl").rows} == {"training"}


def test_a_scripts_exit_code_is_that_of_the_command(where: Path) -> None:
    assert typed(where, "-m", "isoforward", "attach", "own/train_script.py", "5", "exit").returncode == 3


def test_what_is_no_script_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["nowhere.py"]) == 2
    assert "nowhere.py is not a file" in capsys.readouterr().err
    assert script.main(["--help"]) == 0
    assert "isoforward attach SCRIPT" in capsys.readouterr().out
