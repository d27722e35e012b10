"""What a run that goes on does differently from when its checkpoint was written."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_sep.config.schema import RunConfig

_NO_MATTER = (
    "dir",
    "metrics.",
    "parallel.",
    "checkpoint.every",
    "checkpoint.keep",
    "train.steps",
    "train.eval_",
    "train.compile",
    "train.recompute",
    "train.micro_batch_size",
    "train.max_skipped_steps",
    "attention.backend",
    "data.cache",
)
"""Settings that no weight of a later step depends on, by how they begin."""


def changed_settings(then: RunConfig, now: RunConfig) -> list[str]:
    """The settings that change what is learnt, as `section.key: before, now after`."""
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (then, now))
    if before["optimizer.decay_steps"] is None:  # older checkpoints leave it to train.steps
        after["optimizer.decay_steps"] = None
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key)}, now {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key) and not key.startswith(_NO_MATTER)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
