"""One forward, two lives: what training adds to the forward pass, and what serving costs."""

__version__ = "0.1.0"
