"""The card of an export."""

from pathlib import Path

from isoforward.base.config import ModelConfig
from isoforward.formats.loading import load
from isoforward.formats.model_card import Said, about_weights


def test_an_export_has_a_card_that_anybody_may_add_to(exported: Path) -> None:
    card = exported / "README.md"
    text = card.read_text()
    assert f"{sum(p.numel() for p in load(exported).parameters()):,} parameters" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    card.write_text(text + "\nAdded by hand.\n")
    load(exported)


def test_a_model_that_transformers_does_not_compute_is_not_said_to_open_there() -> None:
    config = ModelConfig(positions="rope", vocab=96)
    said: Said = {"model": {}, "dtype": "float32", "parameters": 1, "fingerprint": "0", "about": {}}
    assert "transformers" not in about_weights(config, said)
