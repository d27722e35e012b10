"""`rope_parameters` of transformers' configurations to scaled rotation and back; torch-free."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_sep.config.position import RotaryScalingConfig
from megatron_sep.errors import UserError

Json = dict[str, Any]


class HuggingFaceError(UserError):
    """A config.json of an architecture, or with a setting, that this program does not have, or no JSON at all."""


_LLAMA3 = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
_YARN = {"slow_turns": "beta_slow", "fast_turns": "beta_fast", "whole_bounds": "truncate"}


def read_scaling(rope: Mapping[str, Any], values: Mapping[str, Any]) -> Json | None:
    """Settings of RotaryScalingConfig; None: nothing is slowed down. ``values``: the whole configuration.

    Raises HuggingFaceError for a kind that is not known, KeyError for a key that is missing.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        return {ours: rope[theirs] for ours, theirs in _LLAMA3.items()}
    if kind == "yarn":
        return _read_yarn(rope, values)
    raise HuggingFaceError(f"rope_type={kind!r}: known are 'default', 'linear', 'llama3' and 'yarn'")


def _read_yarn(rope: Mapping[str, Any], values: Mapping[str, Any]) -> Json:
    longest = values.get("max_position_embeddings", 2048)
    original = rope.get("original_max_position_embeddings") or longest
    factor = rope.get("factor") or longest / original
    bounds = {ours: rope[theirs] for ours, theirs in _YARN.items() if rope.get(theirs) is not None}
    growth = rope.get("attention_factor")
    if growth is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        growth = _growth(factor, rope["mscale"]) / _growth(factor, rope["mscale_all_dim"])
    return {"kind": "yarn", "factor": factor, "original_length": original, "growth": growth, **bounds}


def _growth(factor: float, share: float) -> float:
    """Of queries and keys: a share of ln(factor)."""
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def write_scaling(scaling: RotaryScalingConfig) -> Json:
    """Keys of ``rope_parameters``."""
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind == "llama3":
        return {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in _LLAMA3.items()}
    named = {theirs: getattr(scaling, ours) for ours, theirs in _YARN.items()}
    return named | {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "attention_factor": scaling.grown,
    }
