"""What a run that goes on does differently from when its checkpoint was written."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_sep.config.schema import RunConfig
from megatron_sep.errors import UserError

_NO_MATTER = (
    "dir",
    "metrics.",
    "parallel.",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.init_from",
    "checkpoint.init_optimizer",
    "model.init",
    "model.output_init",
    "train.steps",
    "train.eval_",
    "train.compile",
    "train.cuda_graphs",
    "train.deterministic",
    "train.recompute",
    "train.micro_batch_size",
    "train.max_skipped_steps",
    "train.engine",
    "attention.backend",
    "data.cache",
)
"""Settings that no weight of a later step depends on, by how they begin."""


class ChangedError(UserError):
    """A run that goes on with settings that it was not begun with."""


def check_changes(then: RunConfig, now: RunConfig, allowed: Sequence[str]) -> list[str]:
    """The settings that change what is learnt, as `section.key: before, now after`; paths may have moved.

    ``allowed`` are keys or sections. Raises ChangedError for a change that is not allowed, and for a word in
    ``allowed`` that is no setting.
    """
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (then, now))
    strange = [word for word in allowed if not any(_covers(word, key) for key in after)]
    if strange:
        raise ChangedError(f"--allow-change {strange[0]}: no such setting or section")
    changes = {key: (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())}
    changes = {
        key: values
        for key, values in changes.items()
        if values[0] != values[1] and not key.startswith(_NO_MATTER) and not _filled_in(key, values[0])
    }
    said = [f"{key}: {old}, now {new}" for key, (old, new) in changes.items()]
    refused = [key for key in changes if not key.endswith("path") and not any(_covers(word, key) for word in allowed)]
    if refused:
        words = " ".join(f"--allow-change {key}" for key in refused)
        raise ChangedError(
            f"{now.dir}: was begun with other settings ({'; '.join(said)}). Set them as they were, give another "
            f"dir, or pass {words}"
        )
    return said


def _covers(word: str, key: str) -> bool:
    return key == word or key.startswith(f"{word}.")


def _filled_in(key: str, old: Any) -> bool:
    """Older checkpoints left the steps of the schedule to train.steps."""
    return key == "optimizer.decay_steps" and old is None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
