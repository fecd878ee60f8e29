"""What a training step costs where only a part of the model is trained: an adapter, or named parts of it.

A trained weight needs its own gradient, and the gradient of whatever it reads from something trained beneath it. So
with e the adapter's share of the forward's products, forward is 1 + e, backward about 1 + 2e instead of 2: input
gradients for the frozen maps, both for the adapter's. Beneath the first trained weight there is no backward at all.
Activations are kept all the same wherever a gradient passes.

Letters, parts and conventions: cost.py. The formulas hold for checkpointing=none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches

from isoforward.base.config import AdapterConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.model.cost import (
    UPDATES,
    Map,
    Matrix,
    Parts,
    block_matrices,
    forward_flops,
    layer_parameters,
    learned_positions,
    maps,
    norm_parameters,
    parameters,
)

HEAD = "head"


def parts_of(config: ModelConfig) -> dict[str, int]:
    """What adapter=frozen can train, with its parameters."""
    tables = {"embedding": config.vocabulary, "positions": learned_positions(config)}
    found = {name: rows * config.width for name, rows in tables.items() if rows}
    found |= {f"blocks.{layer}": layer_parameters(config) for layer in range(config.layers)}
    return found | {"norm": norm_parameters(config)[1], HEAD: config.vocabulary * config.width}


def matched(targets: Sequence[str], known: Sequence[str]) -> list[str]:
    """`targets`, or BadInput for one that is not among `known`; as PEFT writes them (q_proj) they are known too."""
    for target in targets:
        if target not in known:
            near = get_close_matches(target.removesuffix("_proj"), known, n=3, cutoff=0.5)
            near = near or [name for name in known if name in target.split("_")]
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise BadInput(f"adapter.targets: {target!r} matches nothing; {hint}there are {listed(known)}")
    return list(dict.fromkeys(targets))


def listed(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 12 else [*names[:5], "...", *names[-3:]])


def adapted_maps(config: ModelConfig, adapter: AdapterConfig) -> list[Map]:
    """Those of one layer that have low-rank maps beside them: `targets`, or all (Dettmers 2023, section 4)."""
    there = maps(config)
    wanted = matched(adapter.targets, [each.name for each in there])
    chosen = [each for each in there if each.name in wanted or not wanted]
    for each in chosen:
        if adapter.rank > (width := min(each.inputs, each.outputs)):
            raise BadInput(
                f"adapter.rank={adapter.rank} is above the width of {each.name}, {each.outputs} x {each.inputs}, which "
                f"it would not be low for; write adapter.rank={width} or less"
            )
    return chosen


def trained_parts(config: ModelConfig, adapter: AdapterConfig) -> list[str]:
    return matched(adapter.targets or [HEAD], list(parts_of(config)))


def untied(config: ModelConfig, adapter: AdapterConfig) -> ModelConfig:
    """A tied head that is trained without the embedding becomes a matrix of its own."""
    apart = adapter.name == "frozen" and HEAD in trained_parts(config, adapter)
    return replace(config, tied=False) if apart and config.tied else config


def low_rank_parameters(config: ModelConfig, adapter: AdapterConfig) -> int:
    """Of the pairs beside each adapted map of every layer (Hu 2021, section 4.1)."""
    if adapter.name != "lora":
        return 0
    return config.layers * adapter.rank * sum(each.inputs + each.outputs for each in adapted_maps(config, adapter))


def trained_parameters(config: ModelConfig, adapter: AdapterConfig) -> int:
    if adapter.name == "none":
        return parameters(config).total
    if adapter.name == "lora":
        return low_rank_parameters(config, adapter)
    sizes = parts_of(config)
    return sum(sizes[name] for name in trained_parts(config, adapter))


def adapted_forward_flops(
    config: ModelConfig, adapter: AdapterConfig, *, batch: int, length: int, convention: str = "model"
) -> Parts:
    parts = forward_flops(config, batch=batch, length=length, convention=convention)
    return parts + {"adapter": 2 * batch * length * low_rank_parameters(config, adapter)}


def adapted_backward_flops(
    config: ModelConfig, adapter: AdapterConfig, *, batch: int, length: int, convention: str = "model"
) -> Parts:
    """Products of the backward, along the forward: `reached` is whether something below is trained."""
    tokens = 2 * batch * length
    forward = forward_flops(config, batch=batch, length=length, convention=convention)
    scores = (5 if convention == "hardware" else 4) * (forward["scores"] // config.layers) // 2
    frozen = trained_parts(config, adapter) if adapter.name == "frozen" else []
    full, tied = adapter.name == "none", untied(config, adapter).tied
    parts = Parts(embedding=0, projections=0, scores=0, mlp=0, head=0, adapter=0)
    reached = full or bool({"embedding", "positions"} & set(frozen))
    for layer in range(config.layers):
        trained = full or f"blocks.{layer}" in frozen
        reached |= trained and config.architecture.norm_position == "pre"  # a norm lies before its first matrix
        for place, (matrix, beside) in enumerate(beside_matrices(config, adapter)):
            parts[matrix.part] += tokens * matrix.weights * (reached + trained)
            parts["adapter"] += sum(
                tokens * adapter.rank * (each.inputs * (reached + 1) + 2 * each.outputs) for each in beside
            )
            reached |= trained or bool(beside)
            if place == 0:  # attention follows q, k and v
                parts["scores"] += scores * reached
    reached |= "norm" in frozen
    trained = full or HEAD in frozen or (tied and "embedding" in frozen)
    parts["head"] = tokens * config.width * config.vocabulary * (reached + trained)
    return parts


def beside_matrices(config: ModelConfig, adapter: AdapterConfig) -> Iterator[tuple[Matrix, list[Map]]]:
    """The matrices of a layer, and of each the maps that have a low-rank one beside them."""
    adapted = adapted_maps(config, adapter) if adapter.name == "lora" else []
    names = list(dict.fromkeys(each.matrix for each in maps(config)))
    for matrix, name in zip(block_matrices(config), names, strict=True):
        yield matrix, [each for each in adapted if each.matrix == name]


def adapted_training_state(config: ModelConfig, adapter: AdapterConfig, *, optimizer: str = "adamw") -> Parts:
    """Bytes, fp32 but for an int8 base. What is frozen has neither gradients nor states."""
    trained = trained_parameters(config, adapter)
    weights = 4 * (parameters(untied(config, adapter)).total + low_rank_parameters(config, adapter))
    if adapter.base == "int8":  # 3 bytes less for each weight of the blocks' matrices, and an fp32 scale an output
        weights -= config.layers * sum(3 * each.weights - 4 * each.outputs for each in block_matrices(config))
    return Parts(weights=weights, gradients=4 * trained, optimizer=4 * UPDATES[optimizer].states * trained)
