"""Rotary settings as Transformers writes them: version 4's rope_theta and rope_scaling, version 5's rope_parameters."""

from __future__ import annotations

from collections.abc import Mapping

from isoforward.base.architecture import ROPE_SCALING
from isoforward.base.config import ModelConfig
from isoforward.base.errors import BadInput
from isoforward.formats.untrusted import shown

ORIGINAL = "original_max_position_embeddings"


def rope_from_transformers(raw: Mapping[str, object]) -> dict[str, object]:
    """Theta and scaling, of a whole config.json. What Transformers ignores under a type is ignored here too."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"rope_scaling={shown(rope)} is not a table of settings")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if kind not in ("default", *ROPE_SCALING) or partial not in (1, None) or nested:
        raise BadInput(
            f"rope_type {shown(kind)} (partial_rotary_factor {shown(partial)}{', by layer type' if nested else ''}) is "
            f"not one we implement: default, {', '.join(ROPE_SCALING)} are, on whole heads, the same in all layers"
        )
    if kind == "default":
        return {"rope_theta": theta}
    needed, optional = ROPE_SCALING[kind]
    context = raw.get("max_position_embeddings")
    original = raw.get(ORIGINAL) or rope.get(ORIGINAL) or context
    found = {key: rope.get(key) for key in (*needed, *optional)} | {"original_context": original}
    if kind == "yarn" and found["factor"] is None and isinstance(context, int) and isinstance(original, int):
        found["factor"] = context / max(1, original)
    scaling = {key: found[key] for key in (*needed, *optional) if found[key] is not None}
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **scaling}}


def rope_to_transformers(config: ModelConfig) -> dict[str, object]:
    if config.rope_scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    scaling = {key: value for key, value in config.rope_scaling.items() if value is not None}
    written = {"rope_type": scaling.pop("type", "llama3")}
    if (original := scaling.pop("original_context", None)) is not None:
        written[ORIGINAL] = int(original)
    return {"rope_theta": config.rope_theta, "rope_scaling": written | scaling}
