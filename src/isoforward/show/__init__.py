"""Results as people read them: tables, report, charts, cards, W&B."""
