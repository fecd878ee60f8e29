"""Phases of a training loop that is not ours, found by hooks that are undone afterwards."""
