"""Weights on disk: exports, Transformers directories, GGUF, checkpoints; files from strangers."""
