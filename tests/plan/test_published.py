"""Rows as their sources have them, read again by hand."""

from isoforward.plan.published import published


def test_rows_are_what_their_sources_print() -> None:
    rows = {(p.source, p.model, p.hardware, p.devices, p.length, p.dtype): p for p in published()}
    assert rows["llm-foundry", "mpt-7b", "h100", 8, 2048, "bf16"].tokens_per_s == 10643
    assert rows["llm-foundry", "mpt-7b", "h100", 8, 2048, "bf16"].checkpointing == "none"
    assert rows["llm-foundry", "mpt-70b", "a100", 64, 2048, "bf16"].tokens_per_s == 410
    assert rows["llm-foundry", "mpt-70b", "a100", 64, 2048, "bf16"].checkpointing == "full"
    assert rows["gpt-fast", "llama2-70b", "a100", 8, 104, "bf16"].tokens_per_s == 62.5
    assert rows["mt-nlg", "mt-nlg-530b", "a100_40gb", 2240, 2048, "bf16"].tokens_per_s == 29.2  # 1920 x 2048 / 60.1 s


def test_nothing_is_listed_twice() -> None:
    rows = [(p.source, p.model, p.hardware, p.devices, p.length, p.dtype, p.batch, p.tokens_per_s) for p in published()]
    assert len(set(rows)) == len(rows)
