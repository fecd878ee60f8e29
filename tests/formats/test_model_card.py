"""The card of an export."""

from pathlib import Path

from isoforward.formats.export import load


def test_an_export_has_a_card_that_anybody_may_add_to(exported: Path) -> None:
    card = exported / "README.md"
    text = card.read_text()
    assert f"{sum(p.numel() for p in load(exported).parameters()):,} parameters" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    card.write_text(text + "\nAdded by hand.\n")
    load(exported)
