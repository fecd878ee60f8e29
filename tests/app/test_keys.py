"""What is suggested for a key that is not there."""

from __future__ import annotations

import pytest

from isoforward.app.keys import USUAL, keys_of, nearest
from isoforward.base.config import GenerateConfig, TrainConfig


@pytest.mark.parametrize("known", USUAL.values())
def test_the_names_of_other_tools_lead_to_keys_that_are_there(known: str) -> None:
    groups = {key.partition(".")[0] for key in keys_of(TrainConfig)}
    assert known in keys_of(TrainConfig) or known in groups


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rate", "optim.lr"),
        ("wandb", "tracking"),
        ("output_dir", "run_dir"),
        ("optimizer", "optim"),
        ("trainer.lr", "optim.lr"),
        ("trainer.batch_size", "data.batch"),
        ("trainer.precision", "precision"),
        ("data.block_size", "data.length"),
        ("model.d_model", "model.width"),
        ("optim.lrr", "optim.lr"),
    ],
)
def test_what_was_meant(typed: str, meant: str) -> None:
    assert nearest(typed, keys_of(TrainConfig)) == f"did you mean {meant}? "


def test_only_keys_of_the_command_are_suggested() -> None:
    assert nearest("max_new_tokens", keys_of(GenerateConfig)) == "did you mean max_new_tokens? "
    assert nearest("learning_rate", keys_of(GenerateConfig)) == ""
