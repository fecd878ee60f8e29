"""The second life: inference with frozen weights. Imports no training library."""
