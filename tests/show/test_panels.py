"""Figures that a run in W&B shows."""

from __future__ import annotations
