"""Speeds that others measured and published: published.csv, with its models and where each figure can be read.

`tokens_per_s` is each device's in training, and of all sequences together in decode and prefill. `length` is a training
sequence's, a prompt's, or the tokens that a decode step looks back at, on average.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from isoforward.base.config import ModelConfig

SOURCES = {
    "llm-foundry": "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, bf16",
    "torchtitan": "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1, 3; at 500 W",
    "megatron": "Narayanan 2021 (arXiv 2104.04473), equation 4: 34 and 84 days, from 140 and 163 TFLOP/s measured",
    "mt-nlg": "Smith 2022 (arXiv 2201.11990), section 2.4: 60.1, 50.2 and 44.4 s a step of 1920 sequences",
    "nanogpt": "github.com/karpathy/nanoGPT, README: 600,000 steps of 491,520 tokens in about 4 days on 8 A100 40GB",
    "nanogpt-182": "github.com/karpathy/nanoGPT/issues/182: 29 % of 312 TFLOP/s, as the program prints it, on a 4090",
    "gpt-fast": "github.com/pytorch-labs/gpt-fast, README, at 330 W, prompts of 5 tokens and answers of 200",
    "gpt-fast-27": "github.com/meta-pytorch/gpt-fast/issues/27",
    "llama.cpp-3776": "github.com/ggml-org/llama.cpp/pull/3776, master",
    "llama.cpp-4766": "github.com/ggml-org/llama.cpp/pull/4766",
    "vllm-a100": "johnmusgrave.com/p/vllm-throughput-latency-sweep-on, one request at a time, 1024 + 128 tokens",
    "amd": "amd.com/en/developer/resources/rocm-hub/dev-ai/performance-results.html, May 2025: 128 + 2048 tokens",
    "oracle": "blogs.oracle.com/cloud-infrastructure/serving-llama-31-405b-model-with-amd-mi300x-gpus: 128 + 128",
}


def _gpt(layers: int, width: int, heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(layers=layers, width=width, heads=heads, vocab=vocab, context=2048)


def _llama(layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        vocab=vocab,
        context=8192,
        tied=False,
    )


MPT = 50368  # tokens of its vocabulary
MODELS = {
    "gpt2": _gpt(12, 768, 12, 50257),
    "mpt-125m": _gpt(12, 768, 12, MPT),
    "mpt-350m": _gpt(24, 1024, 16, MPT),
    "mpt-760m": _gpt(24, 1536, 12, MPT),
    "mpt-1b": _gpt(24, 2048, 16, MPT),
    "mpt-3b": _gpt(32, 2560, 20, MPT),
    "mpt-7b": _gpt(32, 4096, 32, MPT),
    "mpt-13b": _gpt(40, 5120, 40, MPT),
    "mpt-30b": _gpt(48, 7168, 56, MPT),
    "mpt-70b": _gpt(80, 8192, 64, MPT),
    "gpt3-175b": _gpt(96, 12288, 96, 51200),
    "mt-nlg-530b": _gpt(105, 20480, 128, 50272),
    "megatron-1t": _gpt(128, 25600, 160, 51200),
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 32000),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, 32000),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672, 128256),
    "llama3-405b": _llama(126, 16384, 128, 8, 53248, 128256),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    kind: str  # training, prefill or decode
    model: str  # of MODELS
    hardware: str  # of the data sheets
    devices: int
    dtype: str  # of the products in training, of the weights in decode
    batch: int  # sequences of one device's forward; in decode, of all
    length: int
    checkpointing: str
    tokens_per_s: float
    source: str  # of SOURCES


@cache
def published() -> tuple[Published, ...]:
    with files(__package__).joinpath("published.csv").open(encoding="utf-8") as file:
        return tuple(
            Published(
                kind=row["kind"],
                model=row["model"],
                hardware=row["hardware"],
                devices=int(row["devices"]),
                dtype=row["dtype"],
                batch=int(row["batch"]),
                length=int(row["length"]),
                checkpointing=row["checkpointing"] or "none",
                tokens_per_s=float(row["tokens_per_s"]),
                source=row["source"],
            )
            for row in csv.DictReader(file)
        )
