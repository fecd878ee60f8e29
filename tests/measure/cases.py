"""A case as small as they get."""

from isoforward.base.config import MeasureConfig, ModelConfig
from isoforward.measure.case import Case

SMALL = Case(
    experiment="x",
    model=ModelConfig(layers=1, heads=2, width=16, context=32, vocab=32),
    batch=2,
    length=16,
    measure=MeasureConfig(prompt=4, new_tokens=4),
)
