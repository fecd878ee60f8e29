"""Scripts of three kinds run under `isoforward attach` as they run alone, to the last digit of what they print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isoforward import Results, read

NANOGPT = """
import math
import torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        wide = 4 * width
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))
        self.dropout = nn.Dropout(0.1)
    def forward(self, x):
        q, k, v = self.attn(self.norm(x)).chunk(3, -1)
        x = x + self.dropout(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)

class GPT(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.wte, self.h = nn.Embedding(64, width), nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 64, bias=False)
    def forward(self, tokens, targets=None):
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        logits = self.head(x)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

torch.manual_seed(1)
text = torch.randint(64, (4000,))
def get_batch():
    at = torch.randint(len(text) - 33, (4,))
    x, y = (torch.stack([text[i + shift : i + shift + 32] for i in at]) for shift in (0, 1))
    return x.to("cpu"), y.to("cpu")

@torch.no_grad()
def estimate_loss():
    model.eval()
    loss = torch.stack([model(*get_batch())[1] for _ in range(3)]).mean().item()
    model.train()
    return loss

model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu")
x, y = get_batch()
for step in range(24):
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (1 + math.cos(step / 24))
    if step % 10 == 0:
        print(step, f"{estimate_loss():.17g}")
    for micro_step in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = model(x, y)
            loss = loss / 2
        x, y = get_batch()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
print(f"{sum(weight.double().sum().item() for weight in model.parameters()):.17g}")
"""

LIGHTNING = """
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos.transformer import LightningTransformer

class Random(torch.utils.data.Dataset):
    def __len__(self):
        return 60
    def __getitem__(self, index):
        tokens = torch.arange(index, index + 9) % 32
        return tokens[:-1], tokens[1:]

if __name__ == "__main__":
    seed_everything(0)
    LightningTransformer.prepare_data = lambda self: None  # it would download a text
    model = LightningTransformer(vocab_size=32)
    trainer = Trainer(max_steps=24, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, torch.utils.data.DataLoader(Random(), batch_size=2))
    print(f"{sum(weight.double().sum().item() for weight in model.parameters()):.17g}")
"""

TRANSFORMERS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16))
rows = [{"input_ids": torch.arange(i, i + 8) % 32, "labels": torch.arange(i, i + 8) % 32} for i in range(60)]
arguments = TrainingArguments("out", per_device_train_batch_size=2, max_steps=24, use_cpu=True, disable_tqdm=True,
                              report_to=[], save_strategy="no", logging_strategy="no")
Trainer(model, arguments, train_dataset=rows).train()
print(f"{sum(weight.double().sum().item() for weight in model.parameters()):.17g}")
"""


def run(where: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return "".join(line for line in done.stdout.splitlines(True) if "runtime" not in line)  # a time that Trainer prints


def both(where: Path, script: str) -> Results:
    (where / "their_script.py").write_text(script)
    attached = run(where, "-m", "isoforward", "attach", "their_script.py")
    assert attached == run(where, "their_script.py")
    (path,) = where.glob("runs/*_attach")
    assert (path / "report.html").is_file()
    return read(path / "results.jsonl")


def phases(found: Results, life: str = "training") -> set[str]:
    return {row.phase for row in found.rows if row.life == life and row.quantity == "time"}


@pytest.mark.slow
def test_a_loop_as_in_nanogpt(tmp_path: Path) -> None:
    found = both(tmp_path, NANOGPT)
    expected = {"forward", "loss", "backward", "clipping", "optimizer", "validation", "step", "residual"}
    assert phases(found) == expected  # its batches come from no DataLoader
    assert {row.conditions["micro_batches"] for row in found.rows} == {2}
    modes = {row.conditions["as_in_training"]: row.value for row in found.rows if row.quantity == "between modes"}
    assert modes["Dropout"] and not modes["what is no layer of PyTorch"]


@pytest.mark.slow
def test_a_demo_of_lightning(tmp_path: Path) -> None:
    found = both(tmp_path, LIGHTNING)
    assert {"data", "forward", "loss", "backward", "optimizer", "step", "residual"} <= phases(found)
    assert {row.conditions["model"] for row in found.rows} == {"LightningTransformer"}


@pytest.mark.slow
def test_a_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = both(tmp_path, TRANSFORMERS)
    assert {"data", "forward", "loss", "backward", "clipping", "optimizer", "step"} <= phases(found)
    assert phases(found, "inference") == {"forward", "prefill", "decode"}
